#!/usr/bin/env bash
# webdataset 1.0.2: a shard of three scans whose files carry their DICOM SOP Instance UID as name, each an image and a
# label: 1.2.840.10008.7.1.png, 1.2.840.10008.7.1.cls, 1.2.840.10008.7.2.png and so on.
#
# Guess: three samples, each with the keys png and cls, as the files of a sample share a name but for the extension.
# Seen: one sample. Its key is "1", what stands before the first dot; the rest of each name counts as extension, so
# all six files are fields of it. There is no error: an epoch is one sample long.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check webdataset==1.0.2 numpy==2.4.6
seen=$("$folder/venv/bin/python" -W ignore -c '
import io, sys, tarfile
import webdataset
shard = sys.argv[1]
with tarfile.open(shard, "w") as tar:
    for scan in range(3):
        for kind in ("png", "cls"):
            member = tarfile.TarInfo(f"1.2.840.10008.7.{scan}.{kind}")
            member.size = 1
            tar.addfile(member, io.BytesIO(b"0"))
for sample in webdataset.WebDataset(shard, shardshuffle=False):
    fields = sorted(field for field in sample if not field.startswith("__"))
    print("sample", sample["__key__"], "with", len(fields), "fields, the first", fields[0])' "$folder/shard.tar")
echo "$seen"
[ "$seen" = "sample 1 with 6 fields, the first 2.840.10008.7.0.cls" ]
