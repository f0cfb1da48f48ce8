"""The report: `python -m bench.report RAW` has it written beside a raw file of `make bench`."""
