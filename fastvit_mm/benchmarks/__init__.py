"""Measures fastvit_mm against timm and other networks: python tools/benchmark.py --help

measure.py does all measuring and report.py all printing and drawing; each other module defines the
comparison of one subcommand.
"""
