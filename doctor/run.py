"""What this machine has and lacks: `python doctor/run.py [json=true] [out=/where/runs/go] [weights=[weights/mvdream]]`.

`sha256=true` reads the weights wholly; else their marks tell files apart by size and samples.

Each line is ok, a warning (works with less) or missing, with the remedy.  Ends with 1 where something is missing.
"""

import json
from dataclasses import asdict

from conf.cli import run
from doctor.config import DoctorConfig


def main(config: DoctorConfig) -> None:
    from doctor.checks import MISSING, OK, examine

    rows = examine(config)
    if config.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        for row in rows:
            print(f"{row.state:<8} {row.name:<20} {row.found}")
            if row.state != OK and row.remedy:
                print(f"{'':29} {row.remedy}")
    raise SystemExit(int(any(row.state == MISSING for row in rows)))


if __name__ == "__main__":
    run(DoctorConfig, "doctor/run", main)
