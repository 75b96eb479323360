"""Studies: many runs, one table, one report.

`nearfold.study.spectrum.run` is the main job, one of the studies in `nearfold.study.catalogue`. Nothing is imported
here, so that the parts that need no training stay cheap to import.
"""
