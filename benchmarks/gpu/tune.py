from benchmarks.gpu.nouns import Run


def tune(run: Run) -> None: ...
