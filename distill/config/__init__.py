"""Every setting, with its default and its line of --help, as frozen dataclasses; settings.py reads them.

data.py      ExamplesConfig, DatasetConfig
generate.py  TeacherConfig, CaptureConfig, ParallelConfig, BatchConfig, CacheConfig, StoreConfig, GenerateConfig,
             is_web, OPTIONS_OF_ALL: is a store's path a web address?
train.py     StoresConfig, StudentConfig, LossConfig, OptimizerConfig, TrainBatchConfig, EvaluationConfig, TrainConfig
rollout.py   RolloutStudentConfig, PromptsConfig, SamplingConfig, RolloutBatchConfig, RolloutConfig
exchange.py  ExportConfig, IngestTeacherConfig, CapturedConfig, IngestConfig
"""
