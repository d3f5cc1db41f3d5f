"""Thin command lines over models/hf_mapping.py; each explains itself with --help."""
