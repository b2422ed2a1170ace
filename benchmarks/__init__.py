"""Measures fastvit_mm beside timm and other networks: python tools/benchmark.py --help

measure.py holds everything that measures and report.py everything that prints and draws; the other
modules only say what is held beside what, one for each subcommand.
"""
