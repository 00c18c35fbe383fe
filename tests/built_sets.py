"""Data sets built of the sources in this folder, and runs on them."""

from conftest import ROOT

from jaxpref import config as config_lib
from jaxpref.data import build
from jaxpref.training import setup


def built(source, table, out):
  build.build(
    build.Plan(source, "", table=table, rows_per_shard=7), out, processes=1, max_bad_share=0.5
  )
  return out


def prepare(pipeline, path, method="dpo", **fields):
  fields = {"model.path": pipeline, "data.path": path, "data.num_rows": 0} | fields
  given = [f"--config.{name}={value}" for name, value in fields.items()]
  config = config_lib.parse_args(
    [f"--config={ROOT}/configs/{method}.py:tiny", *given], flags={}
  )
  return setup.prepare(config[0])
