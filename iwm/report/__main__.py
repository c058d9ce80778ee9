"""Make a run's page anew: python -m iwm.report RUN"""

import sys
from pathlib import Path

from iwm.report.page import write_report
from iwm.report.run_folder import ReportError

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m iwm.report RUN")
    try:
        print(write_report(Path(sys.argv[1])))
    except (ReportError, OSError) as problem:
        sys.exit(f"iwm.report: {problem}")
