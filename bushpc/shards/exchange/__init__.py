"""Cohorts in other formats: in by `bushpc shards import`, out by `bushpc shards export`.

folder | nnU-Net | COCO | DICOM ─cohort.find→ items ─look→ page or problems ─write_shards→ shards
"""
