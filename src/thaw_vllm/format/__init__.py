"""What a snapshot is: bytes to dataclasses and back. docs/format.md is normative.

Standard library only; opens no file.
"""
