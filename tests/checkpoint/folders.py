"""Changing compressed folders in place, as damage, older versions or other hands would."""

import json
import struct

from slablm.checkpoint.config_file import config_digest

RECORD = "slablm"


def edit_json(path, edit):
    """Change a JSON file: `edit` is handed its content."""
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def edit_header(path, edit):
    """Change the header of a safetensors file; the tensors stay."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def edit_record(path, edit):
    """Change what a safetensors file says about the whole checkpoint."""

    def change(header):
        record = json.loads(header["__metadata__"][RECORD])
        edit(record)
        header["__metadata__"][RECORD] = json.dumps(record)

    edit_header(path, change)


def age(folder, version):
    """Make a folder one of an earlier version; before 4 files say nothing about config.json."""
    edit_json(folder / "config.json", lambda config: config["quantization_config"].update(format_version=version))
    written = config_digest(json.loads((folder / "config.json").read_text()))

    def forget(record):
        record["format_version"] = version
        if version < 4:
            del record["modules"], record["config"]
        else:
            record["config"] = written

    for path in folder.glob("*.safetensors"):
        edit_record(path, forget)
    return folder
