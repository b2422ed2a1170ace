"""`python -m fastvit_mm` is the command `fastvit`."""

from .cli import main

if __name__ == '__main__':
    main()
