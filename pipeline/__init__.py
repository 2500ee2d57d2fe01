"""The RLHF pipeline's library: what has a contract and is shared by the stages."""
