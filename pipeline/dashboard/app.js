// The page: an overview of all runs, one run, or several side by side. Asks again every few
// seconds while it is looked at, and changes only what is different.

import { el, figure, words, duration, ago } from "/dom.js";
import { Chart, swatch } from "/charts.js";

const EVERY = 3000; // milliseconds, at least
const view = document.getElementById("view");
const live = document.getElementById("live");
const SMOOTH = { none: 0, light: 0.8, strong: 0.95 };
const options = { log: false, smooth: 0 };
const chosen = new Set(); // runs to compare
let filter = "";
let page = null; // what is shown: {load, show}
let timer = 0;

async function ask(path, query = []) {
  const answer = await fetch(`${path}?${new URLSearchParams(query)}`);
  if (answer.ok) return answer.json();
  const told = await answer.text();
  throw new Error(answer.headers.get("Content-Type").startsWith("application/json")
    ? JSON.parse(told).error : told);
}

/** Replaces an element's content when what it is made of has changed. */
function refill(element, data, make) {
  const state = JSON.stringify(data);
  if (element.state === state) return;
  element.state = state;
  element.replaceChildren(...[make(data)].flat().filter(Boolean));
}

const link = (...parts) => `#/${parts.map(encodeURIComponent).join("/")}`;

// --- What a stage is doing, in words

function doing(stage, now) {
  const steps = stage.of ? `${figure(stage.step)} of ${figure(stage.of)}` : `step ${figure(stage.step)}`;
  if (stage.state === "running") {
    const pace = stage.seconds_per_step ? `, ${duration(stage.seconds_per_step)} a step` : "";
    const left = stage.seconds_left ? `, about ${duration(stage.seconds_left)} left` : "";
    return stage.step || stage.of ? `${steps}${pace}${left}` : `began ${ago(stage.since, now)}`;
  }
  if (stage.state === "stopped") {
    if (stage.point === null) return stage.step ? `stopped at ${steps}, no resume point` : "stopped before its first step";
    return `stopped, goes on from step ${figure(stage.point)}`;
  }
  return { missing: "not begun", finished: "finished", damaged: "damaged" }[stage.state];
}

function bar(stage) {
  if (!stage.of || !["running", "stopped"].includes(stage.state)) return null;
  return el("progress", { max: stage.of, value: Math.min(stage.step, stage.of), class: stage.state });
}

// --- Overview

function overview() {
  const search = el("input", {
    type: "search", placeholder: "Filter runs", "aria-label": "Filter runs", value: filter,
    input: () => { filter = search.value; load(); },
  });
  const button = el("a", { class: "button", hidden: "" });
  const list = el("div", { class: "cards" });
  view.replaceChildren(el("div", { class: "bar" }, search, button), list);
  return {
    load: () => ask("/api/runs"),
    show(told) {
      document.title = "Runs";
      document.getElementById("where").textContent = told.root;
      const runs = told.runs.filter((run) => run.name.toLowerCase().includes(filter.toLowerCase()));
      const minute = Math.floor(told.now / 20);
      refill(list, [runs, minute, filter], () => (runs.length
        ? runs.map((run) => card(run, told.now, update))
        : el("p", { class: "soft" }, told.runs.length ? "No run of that name." : "No runs yet. Begin one: make")));
      update();
    },
  };
  function update() {
    button.hidden = chosen.size < 2;
    button.textContent = `Compare ${chosen.size} runs`;
    button.href = link("compare", "", ...chosen);
  }
}

function card(run, now, update) {
  const current = run.stages.find((stage) => stage.state === "running")
    ?? run.stages.find((stage) => ["stopped", "damaged"].includes(stage.state))
    ?? run.stages.findLast((stage) => stage.state === "finished") ?? run.stages[0];
  const box = el("input", {
    type: "checkbox", "aria-label": `Compare ${run.name}`,
    change: () => { if (box.checked) chosen.add(run.name); else chosen.delete(run.name); update(); },
  });
  box.checked = chosen.has(run.name);
  const figures = Object.entries(run.headline);
  return el(
    "article", { class: "card" },
    el("div", { class: "row" },
      el("a", { class: "title", href: link("run", run.name) }, run.name),
      el("label", { class: "pick" }, box, "compare")),
    el("div", { class: "chain" }, run.stages.map((stage) => el("a", {
      class: `chip ${stage.state}`, href: link("run", run.name, stage.name), title: doing(stage, now),
    }, words(stage.name)))),
    el("div", { class: "soft" },
      current.state === "finished" ? `${words(current.name)} finished` : `${words(current.name)}: ${doing(current, now)}`,
      run.touched ? ` · ${ago(run.touched, now)}` : ""),
    bar(current),
    figures.length ? el("div", { class: "figures" }, figures.map(([name, value]) => el(
      "span", {}, `${words(name)} `, el("b", {}, figure(value))))) : null,
  );
}

// --- One run

function oneRun(name, wanted) {
  const chain = el("nav", { class: "stages" });
  const head = el("section");
  const curves = gallery();
  const samples = sampleBox(name);
  const rest = el("section");
  view.replaceChildren(el("h1", {}, name), chain, head, curves.element, samples.element, rest);
  return {
    async load() {
      const run = await ask("/api/run", { run: name });
      const stage = run.stages.find((one) => one.name === wanted) ?? latest(run.stages);
      const query = { run: name, stage: stage.name };
      const [drawn, said] = await Promise.all([ask("/api/curves", query), samples.ask(stage.name)]);
      return { run, stage, drawn, said };
    },
    show({ run, stage, drawn, said }) {
      document.title = `${name} · ${words(stage.name)}`;
      document.getElementById("where").textContent = "";
      refill(chain, [run.stages, stage.name, Math.floor(run.now / 20)], () => run.stages.map((one) => el("a", {
        class: `stage ${one.state}`, href: link("run", name, one.name),
        "aria-current": one.name === stage.name ? "page" : null,
      }, el("b", {}, words(one.name)), el("span", { class: "soft" }, short(one, run.now)), bar(one))));
      refill(head, [stage, drawn.remarks, Math.floor(run.now / 5)], () => about(name, stage, drawn.remarks, run.now));
      curves.show(drawn.charts, (line) => ({ name: line.label, colour: place(line.label) }));
      samples.show(said);
      refill(rest, [stage.settings], ([settings]) => folded("Settings", Object.entries(settings).map(
        ([key, value]) => [key, String(value)])));
    },
  };
}

const place = (label) => (label === "validation" ? 1 : 0);

/** Returns the stage that is worth looking at: the one at work, else the last that did something. */
function latest(stages) {
  const begun = stages.filter((stage) => stage.state !== "missing");
  return begun.find((stage) => stage.state === "running")
    ?? begun.findLast((stage) => stage.name !== "report") ?? stages[0];
}

function short(stage, now) {
  if (stage.state === "finished") return stage.minutes ? duration(stage.minutes * 60) : "finished";
  if (stage.state === "running") return stage.of ? `${Math.floor((100 * stage.step) / stage.of)}%` : "running";
  return { missing: "not begun", stopped: stage.point === null ? "stopped" : `stopped at ${figure(stage.point)}`, damaged: "damaged" }[stage.state];
}

function about(run, stage, remarks, now) {
  const facts = [
    doing(stage, now), stage.touched ? `written ${ago(stage.touched, now)}` : "",
    stage.memory ? `${figure(stage.memory)} GiB` : "", stage.commit ? `commit ${stage.commit}` : "",
  ].filter(Boolean).join(" · ");
  const pages = stage.pages.map((file) => el("a", {
    class: "button", href: `/report/${file}?${new URLSearchParams({ run })}`, target: "_blank", rel: "noopener",
  }, file === "index.html" ? "Open the report" : "Open the rollouts"));
  const figures = stage.state === "finished" ? Object.entries(stage.figures) : []; // else on the charts
  return [
    el("h2", {}, words(stage.name)), el("p", {}, el("span", { class: `dotted ${stage.state}` }), facts),
    ...[...stage.remarks, ...remarks].map((text) => el("p", { class: "remark" }, text)),
    pages.length ? el("p", {}, ...pages) : null,
    figures.length ? el("dl", { class: "box grid" }, figures.map(([key, value]) => el(
      "div", {}, el("dt", {}, words(key)), el("dd", {}, figure(value))))) : null,
  ];
}

function folded(title, rows) {
  return rows.length ? el("details", { class: "box" }, el("summary", {}, title), el("table", {}, rows.map(
    ([key, ...cells]) => el("tr", {}, el("th", { scope: "row" }, key), cells.map((cell) => el("td", {}, cell))),
  ))) : null;
}

// --- Curves

function gallery() {
  const charts = new Map();
  const grid = el("div", { class: "charts" });
  const smooth = el("select", { "aria-label": "Smoothing", change: () => { options.smooth = SMOOTH[smooth.value]; load(); } },
    Object.keys(SMOOTH).map((name) => el("option", { value: name }, name)));
  smooth.value = Object.keys(SMOOTH).find((name) => SMOOTH[name] === options.smooth);
  const log = el("input", { type: "checkbox", change: () => { options.log = log.checked; load(); } });
  log.checked = options.log;
  const bar_ = el("div", { class: "bar" }, el("h3", {}, "Curves"),
    el("label", {}, "smoothing ", smooth), el("label", {}, log, " log scale"));
  const element = el("section", { hidden: "" }, bar_, grid);
  return {
    element,
    show(found, naming) {
      element.hidden = !found.length;
      const titles = new Set(found.map((one) => one.title));
      for (const [title, chart] of charts) {
        if (!titles.has(title)) { chart.element.remove(); charts.delete(title); }
      }
      for (const one of found) {
        if (!charts.has(one.title)) charts.set(one.title, new Chart(one.title));
        const chart = charts.get(one.title);
        if (!chart.element.isConnected) grid.append(chart.element);
        chart.update(one.lines.map((line) => ({ ...naming(line, one), x: line.x, y: line.y })), { ...options });
      }
    },
  };
}

// --- Samples

function sampleBox(run) {
  const element = el("section");
  let step = null;
  return {
    element,
    ask: (stage) => ask("/api/samples", { run, stage, ...(step === null ? {} : { step }) }),
    show: (told) => refill(element, told, () => (told.rows.length ? [
      el("div", { class: "bar" }, el("h3", {}, "Samples"), steps(told),
        el("span", { class: "soft" }, `${told.rows.length} of ${told.num_rows}`)),
      ...told.rows.map(sample),
    ] : [])),
  };
  function steps(told) {
    if (told.steps.length < 2) return null;
    const select = el("select", { "aria-label": "Step", change: () => { step = select.value; load(); } },
      told.steps.toReversed().map((one) => el("option", { value: one }, `step ${figure(one)}`)));
    select.value = told.step;
    return select;
  }
}

/** Returns a sample: its prompt, and each reply with the numbers that are named after it. */
function sample({ texts, numbers }) {
  const { prompt, group, ...replies } = texts;
  const rest = { ...numbers };
  const figures = (found) => el("div", { class: "figures" }, Object.entries(found).map(([name, value]) => el(
    "span", {}, `${words(name)} `, el("b", {}, figure(value)))));
  const boxes = Object.entries(replies).map(([name, text]) => {
    const owner = name.replace(/\.text$/, "");
    const own = {};
    for (const key of Object.keys(rest).filter((one) => one.startsWith(`${owner}.`))) {
      own[key.slice(owner.length + 1)] = rest[key];
      delete rest[key];
    }
    return el("div", { class: "reply" }, el("div", { class: "soft" }, words(owner)),
      el("p", {}, text || el("span", { class: "soft" }, "(empty)")), Object.keys(own).length ? figures(own) : null);
  });
  return el("article", { class: "box sample" }, prompt === undefined ? null : el("p", { class: "prompt" }, prompt),
    el("div", { class: "replies" }, boxes), Object.keys(rest).length ? figures(rest) : null);
}

// --- Several runs

function comparison(stage, names) {
  const tabs = el("nav", { class: "tabs" });
  const settings = el("section");
  const curves = gallery();
  const figures = el("section");
  view.replaceChildren(el("h1", {}, `${names.length} runs`), tabs, settings, curves.element, figures);
  const query = (of) => [...names.map((name) => ["run", name]), ["stage", of]];
  return {
    async load() {
      let told = await ask("/api/compare", query(stage || "evaluate"));
      const wanted = stage || (told.stages.includes("ppo") ? "ppo" : told.stages.at(-1) ?? "data");
      if (!stage) told = await ask("/api/compare", query(wanted));
      return { told, wanted, drawn: await ask("/api/curves", query(wanted)) };
    },
    show({ told, wanted, drawn }) {
      document.title = `${names.length} runs · ${words(wanted)}`;
      document.getElementById("where").textContent = "";
      refill(tabs, [told.stages, wanted], () => told.stages.map((one) => el("a", {
        href: link("compare", one, ...names), "aria-current": one === wanted ? "page" : null }, words(one))));
      refill(settings, [told, drawn.remarks], () => [
        ...drawn.remarks.map((text) => el("p", { class: "remark" }, text)),
        sideBySide(told.runs, [["", ["state"], (run) => run], ["Settings that differ", told.differing, (run) => run.settings ?? {}]])]);
      const keys = [...new Set(told.runs.flatMap((run) => Object.keys(run.figures ?? {})))];
      refill(figures, told, () => (keys.length ? [
        el("div", { class: "bar" }, el("h3", {}, "Figures")),
        sideBySide(told.runs, [["", keys, (run) => run.figures ?? {}]])] : []));
      curves.show(drawn.charts, (line, { lines }) => {
        const several = new Set(lines.map((one) => one.label)).size > 1;
        const colour = names.indexOf(line.run) + (several && line.label === "validation" ? 8 : 0);
        return { name: several ? `${line.run}, ${line.label}` : line.run, colour };
      });
    },
  };
}

/** Returns a table with a column per run; each part has a title, keys, and where a run holds them. */
function sideBySide(runs, parts) {
  const head = runs.map((run, colour) => el("th", { scope: "col" }, swatch({ colour }), run.name));
  const cell = (value) => el("td", {}, value === undefined ? "" : figure(value));
  return el("div", { class: "box scroll" }, el("table", { class: "wide" }, el("tr", {}, el("th"), head),
    parts.filter(([, keys]) => keys.length).flatMap(([title, keys, of]) => [
      title ? el("tr", { class: "part" }, el("th", { colspan: runs.length + 1 }, title)) : "",
      ...keys.map((key) => el("tr", {}, el("th", { scope: "row" }, words(key)), runs.map((run) => cell(of(run)[key]))))])));
}

// --- Which of them, and when it asks again

function route() {
  const [kind, first, ...others] = location.hash.replace(/^#\//, "").split("/").map(decodeURIComponent);
  if (kind === "run") page = oneRun(first, others[0]);
  else if (kind === "compare") page = comparison(first, others);
  else page = overview();
  window.scrollTo(0, 0);
  load();
}

async function load() {
  clearTimeout(timer);
  const asked = page;
  const began = performance.now();
  try {
    const told = await asked.load();
    if (asked !== page) return;
    asked.show(told);
    live.className = "live on";
    live.textContent = "live";
  } catch (error) {
    if (asked !== page) return;
    live.className = "live off";
    live.textContent = error instanceof TypeError ? "no answer: is the dashboard still running?" : error.message;
  }
  clearTimeout(timer);
  const pause = Math.max(EVERY, 20 * (performance.now() - began)); // a slow answer is not asked for often
  if (!document.hidden) timer = setTimeout(load, pause);
}

window.addEventListener("hashchange", route);
document.addEventListener("visibilitychange", () => { if (!document.hidden) load(); });
route();
