"""A tuner that knows the contract and nothing of OpenMAE: a skill folder, status.json, names of checkpoints."""

import json
import math
import random
import subprocess

import yaml


def draw(leaf, known, rng):
    low, high = (leaf.get(f"automl_{end}", leaf[end]) for end in ("minimum", "maximum"))
    if leaf.get("math_cond") == "< depends_on" and leaf["depends_on"] in known:
        high = min(high, known[leaf["depends_on"]] - 1)
    if leaf.get("automl_log"):
        return math.exp(rng.uniform(math.log(low), math.log(high)))
    return rng.randint(low, high) if leaf["type"] == "int" else rng.uniform(low, high)


def train(skill, python, values, folder):
    how = yaml.safe_load((skill / "references/skill_info.yaml").read_text())["actions"]["train"]["execution"]
    spec = yaml.safe_load((skill / "references/spec_template_train.yaml").read_text()) | {"results_dir": str(folder)}
    for key, value in values.items():
        *parents, name = key.split(".")
        section = spec
        for part in parents:
            section = section.setdefault(part, {})
        section[name] = value
    folder.mkdir(parents=True)
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec))
    arguments = [part.format(config_path=folder / "spec.yaml") for part in how["args"]]
    code = subprocess.run([python, skill / how["script"], *arguments], check=False).returncode
    lines = [json.loads(line) for line in (folder / "train/status.json").read_text().splitlines()]
    metric = [line["kpi"]["ACC_all"] for line in lines if "ACC_all" in line.get("kpi", {})][-1:] or [-1.0]
    return code, metric[0] if code == 0 else -1.0, sorted((folder / "train").glob("model_epoch_*_step_*.pth"))


def tune(skill, python, base, out, trials, seed=0):
    """Train ``trials`` times, then the best one on to twice its epochs; (code, metric, checkpoints) of each."""
    schema, rng, done = json.loads((skill / "schemas/train.schema.json").read_text()), random.Random(seed), []
    for number in range(trials):
        values = dict(base)
        for key in schema["automl_default_parameters"]:
            leaf = schema
            for part in key.split("."):
                leaf = leaf["properties"][part]
            values[key] = draw(leaf, values, rng)
        done.append((*train(skill, python, values, out / str(number)), values))
    _, _, checkpoints, values = max(done, key=lambda trial: trial[1])
    more = {"train.num_epochs": 2 * base["train.num_epochs"]}
    more["train.resume_training_checkpoint_path"] = str(checkpoints[-1])
    return done, train(skill, python, values | more, out / "longer")
