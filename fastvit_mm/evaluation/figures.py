"""What others measured with the authors' weights."""

#: Top-1 in percent on ImageNet, -A, -R and -Sketch, measured by timm at 256 pixels with crop ratio
#: 0.9 (MA36: 0.95), by variant and recipe.
TIMM = {
    ('sa12', 'ImageNet-1k'): dict(clean=80.85, a=16.31, r=42.92, sketch=29.68),
    ('sa12', 'distilled'): dict(clean=81.84, a=21.31, r=44.11, sketch=31.17),
    ('sa24', 'ImageNet-1k'): dict(clean=82.71, a=29.00, r=46.65, sketch=34.10),
    ('sa24', 'distilled'): dict(clean=83.37, a=31.35, r=47.97, sketch=35.22),
    ('sa36', 'ImageNet-1k'): dict(clean=83.50, a=33.00, r=48.20, sketch=36.54),
    ('sa36', 'distilled'): dict(clean=84.03, a=36.41, r=50.33, sketch=37.10),
    ('ma36', 'ImageNet-1k'): dict(clean=83.88, a=34.53, r=49.52, sketch=36.57),
    ('ma36', 'distilled'): dict(clean=84.61, a=37.53, r=51.88, sketch=38.39),
}

#: The paper's mean corruption errors; they could not be compared with the paper itself.
PAPER_MCE = dict(sa12=62.2, sa24=55.3, sa36=51.8, ma36=49.9)


def published_rows(arch: str) -> dict[str, dict[str, float]]:
    """Figures by set, by where they are from."""
    rows = {
        f"authors' weights at 256, {recipe} (timm)": figures
        for (variant, recipe), figures in TIMM.items()
        if variant == arch
    }
    if arch in PAPER_MCE:
        rows['the paper (unverified)'] = dict(c=PAPER_MCE[arch])
    return rows
