"""Damaged and hostile files against everything that reads files. `scripts/fuzz` runs it; see `run.py`.

To add a loader, add it to `targets.TARGETS`; to add a format of files, add its valid files to `seeds.seeds`.
"""
