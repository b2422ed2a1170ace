"""Why CPU training stays contiguous: a weight gradient in PyTorch corrupts memory.

    python docs/channels_last_crash.py

FastViT's stem has a dense 1x1 convolution with stride 2 over the 3 channels of the image. In
channels_last its weight gradient on the CPU (oneDNN's jit_1x1 backward_weights) writes past its
workspace if there are fewer input channels than fit in one vector: a segmentation fault, or
glibc's `free(): invalid next size` or `double free` some steps later. Seen with torch 2.10.0 and
2.14.1 on a CPU with AVX-512; https://github.com/uxlfoundation/oneDNN/issues/6035 reports the same.
Without the gradient of this one convolution, timm's FastViT T8 and SA12 train in channels_last.
Each case below runs in its own process.
"""

import os
import subprocess
import sys

GRADIENT = """
import torch
channels, stride, layout = {case}
layout = getattr(torch, layout)
x = torch.randn(2, channels, 128, 128).to(memory_format=layout)
conv = torch.nn.Conv2d(channels, 48, 1, stride, bias=False).to(memory_format=layout)
for _ in range(4):
    conv(x).square().mean().backward()
"""
CASES = {
    (3, 2, 'channels_last'): 'the stem of FastViT',
    (3, 2, 'contiguous_format'): 'the same, contiguous',
    (3, 1, 'channels_last'): 'stride 1',
    (16, 2, 'channels_last'): '16 input channels',
}


def survives(case: tuple) -> bool:
    # makes glibc check its heap in every call and overwrite freed memory
    env = {**os.environ, 'MALLOC_CHECK_': '3', 'MALLOC_PERTURB_': '165', 'OMP_NUM_THREADS': '1'}
    command = [sys.executable, '-c', GRADIENT.format(case=case)]
    return subprocess.run(command, env=env, capture_output=True).returncode == 0


def main() -> None:
    import torch

    print(f'torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}')
    results = {case: survives(case) for case in CASES}
    for case, words in CASES.items():
        print(f'{"survives" if results[case] else "CRASHES "}  {case}  {words}')
    crashes, *others = results.values()
    if not crashes and all(others):
        print('verdict: this PyTorch crashes in the weight gradient of a strided dense 1x1')
        print('convolution with few input channels in channels_last: train contiguous on the CPU')
    elif all(results.values()):
        print('verdict: no crash here; this PyTorch or CPU uses another kernel')
    else:
        print('verdict: something else crashes as well')


if __name__ == '__main__':
    main()
