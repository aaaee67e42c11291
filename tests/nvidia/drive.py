"""Call NVIDIA's packages: ``python drive.py REQUEST.json`` prints one JSON object. No test; run by test_runner.py.

The packages are put in front of this process's path only, so that the jobs it starts do not see them.
"""

from __future__ import annotations

import copy
import json
import logging
import sys
from pathlib import Path
from typing import Any

ACTIONS = ("train", "evaluate", "inference", "export", "gen_trt_engine")


def load(skill: Path, data: str) -> dict[str, Any]:
    """Load every action, which validates its schema and template (from 7.1 on), and fill in the data sources."""
    import yaml
    from tao_automl.runner import AutoMLRunner, SkillContext
    from tao_sdk.script_runner import build_entrypoint

    found: dict[str, Any] = {}
    for action in ACTIONS:
        context = SkillContext(skill, action)
        AutoMLRunner._apply_data_sources(context.skill_info, context.default_specs, action, data, data, "ssl")
        job = {key: context.action_cfg[key] for key in ("command", "inputs", "outputs", "config_format")}
        assert yaml.safe_dump(context.default_specs)
        assert build_entrypoint(specs=context.default_specs, **job)["command"]
        found[action] = context.default_specs
    return found


def refuse(skill: Path, schemas: list[dict[str, Any]]) -> list[str]:
    """Return what NVIDIA's code says against each of these train schemas; empty where it accepts one."""
    from tao_automl.runner import SkillContext

    path, said = skill / "schemas/train.schema.json", []
    for schema in schemas:
        path.write_text(json.dumps(schema))
        try:
            context = SkillContext(skill, "train")
            draw(context.schema, context.default_specs, "bayesian", None, 1)
        except (TypeError, ValueError) as error:
            said.append(str(error))
        else:
            said.append("")
    return said


def draw(schema: Any, spec: dict[str, Any], algorithm: str, ranges: Any, count: int) -> list[dict[str, Any]]:
    """Return what a sampler draws for the searched parameters; the first draw is at the lower bounds."""
    import tempfile

    from tao_automl import AutoML
    from tao_sdk.spec_serialization import normalize_specs

    settings = {"algorithm": algorithm, "metric": "ACC_all"}
    search = AutoML(tempfile.mkdtemp(), "mae", spec, settings, custom_param_ranges=ranges, search_schema=schema)
    brain, drawn = search._controller.brain, []
    for number in range(count):
        # some samplers turn a number from 0 to 1 into a value
        where = (number / max(count - 1, 1),) if algorithm in ("bayesian", "bfbo") else ()
        rows = [dict(row) for row in brain.parameters]
        drawn.append({row["parameter"]: brain.generate_automl_param_rec_value(row, *where) for row in rows})
    return [normalize_specs(values) for values in drawn]


def sample(skill: Path, algorithms: list[str], ranges: Any, count: int) -> dict[str, list[dict[str, Any]]]:
    """Return what each sampler draws; NVIDIA's validation and OpenMAE's loader have accepted all of it."""
    from tao_automl.runner import AutoMLRunner, SkillContext, _validate_specs_against_schema

    from openmae.spec.load import load_spec

    context = SkillContext(skill, "train")
    context.default_specs["dataset"]["train_data_sources"] = "photos"
    drawn = {
        name: draw(context.schema, copy.deepcopy(context.default_specs), name, ranges, count) for name in algorithms
    }
    for values in (values for rows in drawn.values() for values in rows):
        spec = AutoMLRunner._merge_specs(context.default_specs, values)
        _validate_specs_against_schema(spec, context.schema, skill, require_all=True)
        load_spec(spec, action="train")
    return drawn


def search(skill: Path, venv: str, work: str, data: str, settings: Any, ranges: Any, overrides: Any) -> Any:
    """Run a search to its end; the result has the runner's answer, and what the jobs left."""
    from tao_automl.runner import AutoMLRunner
    from tao_sdk.platforms.virtualenv import VirtualEnvSDK

    sdk = VirtualEnvSDK(venv_path=venv, work_dir=work)
    runner = AutoMLRunner(sdk=sdk, skill_dir=skill, action="train", poll_interval=1)
    jobs: dict[Any, str] = {}
    resumed: list[str] = []

    def note(rec: Any, metric: Any, status: str) -> None:
        jobs[rec.id] = rec.job_id
        resumed.extend(filter(None, [getattr(rec, "resume_checkpoint_path", None)]))

    result = runner.run(
        train_dataset_uri=data,
        eval_dataset_uri=data,
        automl_settings=settings,
        custom_param_ranges=ranges,
        spec_overrides=overrides,
        workspace_path=f"{work}/automl",
        on_result=note,
        gpu_count=0,
    )
    best = jobs[result["best"]["rec_id"]]
    folder = Path(sdk.get_job_results_dir(best))
    logs = {job["job_id"]: sdk.get_job_logs(job["job_id"], tail=20) for job in sdk.list_jobs()}
    files = [str(folder / path) for path in sdk.list_results(best)]
    return {"result": result, "resumed": resumed, "files": files, "logs": logs}


def act(skill: Path, venv: str, work: str, action: str, values: dict[str, Any]) -> dict[str, Any]:
    """Run one action as a job of VirtualEnvSDK, with the folder's own declarations."""
    import time

    from tao_automl.runner import AutoMLRunner, SkillContext
    from tao_sdk.platforms.virtualenv import VirtualEnvSDK

    sdk, context = VirtualEnvSDK(venv_path=venv, work_dir=work), SkillContext(skill, action)
    how, config = context.execution, context.action_cfg
    job = sdk.create_python_job(
        script=how.script,
        specs=AutoMLRunner._merge_specs(context.default_specs, values),
        config_format=how.config_format,
        script_args=how.script_args,
        inputs=config["inputs"],
        outputs=config["outputs"],
        upload_excludes=config["upload_excludes"],
        cwd=how.cwd,
        action=action,
        gpu_count=0,
    )
    while sdk.get_job_status(job.id).status not in ("Complete", "Error", "Canceled"):
        time.sleep(0.2)
    status = sdk.get_job_status(job.id).status
    folder = Path(sdk.get_job_results_dir(job.id))
    files = [str(folder / path) for path in sdk.list_results(job.id)]
    return {"status": status, "files": files, "log": sdk.get_job_logs(job.id)}


if __name__ == "__main__":
    request = json.loads(Path(sys.argv[1]).read_text())
    sys.path[:0] = request.pop("packages")
    logging.disable(logging.CRITICAL)
    call = request.pop("call")
    print(json.dumps(globals()[call](Path(request.pop("skill")), **request), default=str))
