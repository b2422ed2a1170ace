"""What a run needs beside mmengine's runner: several processes, batches and random numbers that a
resumed run continues with, a folder of its own, and the options of ``tools/train.py``."""
