_base_ = '../../_base_/runtime.py'
custom_imports = dict(imports=['fastvit_mm.hand_mesh'])
val_cfg = dict()
test_cfg = dict()
default_hooks = dict(checkpoint=dict(save_best='PA-MPVPE', rule='less'))
visualizer = dict(type='Visualizer', vis_backends=[dict(type='LocalVisBackend')])
default_scope = 'mmengine'
custom_hooks = [dict(type='SyncStatisticsHook')]
