"""What ran, as proof and as a bill: the proof of a step, the ledger of a run, and the watcher behind both."""
