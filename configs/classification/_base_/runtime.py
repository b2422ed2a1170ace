_base_ = '../../_base_/runtime.py'
custom_imports = dict(imports=['fastvit_mm.transforms'])
