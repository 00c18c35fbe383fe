"""What programs print must not decide how they end."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
from jaxpref.runtime import cli
def job(argv):
  print('78 ± 4 → 京')
  print('done')
cli.run(lambda argv: cli.exit_status(job, argv))
"""


def run(redirect="", program=PROGRAM, **env):
  command = f'"$0" -c "$1" {redirect}'
  return subprocess.run(
    ["bash", "-c", f"set -o pipefail; {command}", sys.executable, program],
    env=os.environ | env,
    capture_output=True,
    check=False,
  )


def test_characters_that_an_output_lacks_are_spelled():
  done = run(PYTHONIOENCODING="ascii")
  assert done.returncode == 0
  assert done.stdout == b"78 +- 4 -> \\u4eac\ndone\n"
  assert not done.stderr


@pytest.mark.parametrize(
  "redirect", ["| true", "| head -0", ">&-", ">&- 2>&-", "2>&-", "< /dev/null >/dev/full"]
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_output_that_nobody_reads_is_no_failure(redirect, unbuffered):
  done = run(redirect, PYTHONUNBUFFERED=unbuffered)
  assert done.returncode == 0
  assert not done.stderr


def test_files_do_not_get_the_numbers_of_closed_streams(tmp_path):
  opens = f"import sys; print(open({str(tmp_path / 'x')!r}, 'w').fileno(), file=sys.stderr)"
  done = run(">&-", PROGRAM.replace("print('done')", opens))
  assert int(done.stderr) > 2
