"""Entry points of the jobs: `defi NAME ...` and `python -m defi_platform.jobs.NAME ...` where the package is installed.

A checkout's jobs/NAME.py call the same functions. Each parses a command line, calls one function and prints its result.
"""
