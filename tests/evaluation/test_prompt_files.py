"""Files of prompts: what is read, and what is refused with file and line."""

import json

import pytest

from pipeline.errors import UserError
from pipeline.evaluation.prompt_files import check_output, prompt_text, read_prompts, write_replies

MESSAGES = [{"role": "user", "content": "hi"}]


def written(folder, name, text):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_conversation_reads_as_a_line_per_message():
    assert prompt_text("hello") == "hello"
    reply = {"role": "assistant", "content": "yes?"}
    assert prompt_text([*MESSAGES, reply]) == "user: hi\nassistant: yes?"


def test_text_is_one_prompt_a_line(tmp_path):
    path = written(tmp_path, "prompts.txt", "\ufeffhello\n\n  how are you? \n")
    assert read_prompts(path) == ["hello", "how are you?"]


def test_json_lines_hold_texts_or_messages(tmp_path):
    rows = [{"prompt": "hello", "id": 3}, {"prompt": MESSAGES}, {"messages": MESSAGES}]
    text = "\n".join(map(json.dumps, rows))
    assert read_prompts(written(tmp_path, "p.jsonl", text)) == ["hello", MESSAGES, MESSAGES]


def talk(*roles: str) -> str:
    """A row whose messages are of these roles."""
    return json.dumps({"messages": [{"role": role, "content": "hi"} for role in roles]})


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"prompt": "a"}\n{"prompt": ', "line 2: not JSON"),
        ('{"text": "a"}', "line 1: needs `prompt`"),
        ('\n{"prompt": "  "}', "line 2: prompt is empty"),
        ('{"prompt": 3}', "line 1: prompt must be a text, got int"),
        ('["a"]', "line 1: needs `prompt`"),
        ('{"prompt": [{"role": "user"}]}', "line 1: content is missing"),
        ('{"prompt": []}', "line 1: prompt must be a list of messages, and not empty"),
        (talk("user", "assistant"), "line 1: prompt must end with a message of the user"),
        (talk("bot", "user"), "line 1: a message of prompt needs a role of system, user, assist"),
        ("\n \n", "holds no prompt"),
    ],
)
def test_a_malformed_row_is_named(tmp_path, text, complaint):
    with pytest.raises(UserError, match=complaint):
        read_prompts(written(tmp_path, "p.jsonl", text))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no such file: .*none\.txt"):
        read_prompts(tmp_path / "none.txt")


def test_what_is_not_text_is_refused(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8 text"):
        read_prompts(tmp_path / "p.txt")


def test_replies_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "replies.jsonl"
    check_output(path, prompts=tmp_path / "prompts.txt")
    write_replies(path, [{"response": "é"}, {"response": "b"}])
    assert path.read_text(encoding="utf-8") == '{"response": "é"}\n{"response": "b"}\n'
    with pytest.raises(TypeError):
        write_replies(path, [{"response": "c"}, {"response": object()}])
    assert path.read_text(encoding="utf-8").startswith('{"response": "é"}')
    assert [file.name for file in path.parent.iterdir()] == ["replies.jsonl"]


def test_what_cannot_be_written_is_told_before_there_are_replies(tmp_path):
    file = written(tmp_path, "file", "")
    for output in (file / "replies.jsonl", tmp_path / ("x" * 250)):
        with pytest.raises(UserError, match=r"generate\.output: .* cannot be written \(.+\); name"):
            check_output(output, prompts=tmp_path / "prompts.txt")
    check_output(tmp_path / "replies.jsonl", prompts=tmp_path / "prompts.txt")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
