"""A program that runs and says nothing, in place of one of a fork pool's."""

import time

if __name__ == "__main__":
    time.sleep(600)
