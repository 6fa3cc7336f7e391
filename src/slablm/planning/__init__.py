"""What a compression will give, take and need, before anything is computed.

    skeleton     the model on the meta device: headers and config.json
    size         what is stored, to the byte
    rehearsal    one block's calibration without values
    memory       what is in memory together
    timing       rates measured for a few seconds, and counting
    checks       what cannot work

`plan` does all of it. `compress` runs `preflight`, the same without the timing, before it calibrates.

May import: `compression` and what stands above it.
"""
