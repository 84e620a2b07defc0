"""What engines have compiled, as a file that travels: packed, looked at, and unpacked where it is trusted."""
