"""Stages, one file each: options and inputs in, one recorded output out; they meet in files."""
