"""Whether a training goes to AutoML: an explicit value, or what the user's words ask for, or the default.

The words are English. A sentence turns AutoML off where what negates it is odd in number: "no AutoML" does, "do not
turn off AutoML" does not, "turn off mixup" says nothing of it. The last sentence that speaks of it counts.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from openmae.errors import SpecError

Policy = Literal["auto", "off"]

SKILL = Path(__file__).parents[1] / "skill" / "tao-train-mask-auto-encoder"
NOT_RUNNABLE = "AutoML is enabled but not runnable until schemas are generated"
_VALUES: dict[str, Policy] = {"auto": "auto", "on": "auto", "off": "off"}

_SENTENCE = re.compile(r"[^.,;:!?\n()]+(?:[.:,](?=\w)[^.,;:!?\n()]+)*[.,;:!?\n()]*")
_REWRITES = tuple(
    (re.compile(pattern), text)
    for pattern, text in (
        (r"[’`]", "'"),
        (r"\bfine[ -]?tun", "finetun"),
        (r"(?<![\w/.=])-*(no|non)-(?=auto-?ml|hpo)", r"\1 "),
        (r"(?<![\w/.=])(?:auto-?ml|hpo)-free\b", "no automl"),
        (r"(?<![\w/.])automl_policy\s*[:=]?\s*", "automl "),
        (r"(?<![\w/.-])auto[ -]?ml(?:[:=]\s*|\b(?![/_.]\w))-?", "automl "),
        (
            r"(?<![\w/.-])(?:hyper-?)?param(?:eter)?s?[ -](?:optimi[sz]ation|search(?:es|ing)?|tuning|sweeps?)\b",
            "automl ",
        ),
        (r"(?<![\w/.-])auto(?:matic|mated)?[ -]tuning\b", "automl "),
        (r"(?<![\w/.-])hpo(?:[:=]\s*|\b(?![/_.]\w))-?", "automl "),
        (r"\bautoml +(?=(?:results?|trials?|stud(?:y|ies)|budget|report|recommendations?|after|until)\b)", "automl's "),
        (r"\bunder (?:any|no) circumstances?\b", ""),
        (r"\b(?:never|not|\w+n't) (?:say|said|ask|asked|mean|meant|tell|told)(?: you)? to\b", "not"),
        (r"\b(no|without(?: any)?|skip(?: the)?) (?:tuning|hyper-?tuning)(?= *$| at all| please| this)", r"\1 automl "),
        (
            r"\b(?:plain|direct|vanilla|ordinary)(?: old| simple| single| single-gpu)? "
            r"(?:training|train|pretraining|pretrain|finetuning|finetune|training run|run)\b",
            "plaintraining",
        ),
        (r"\btrain(?:ing)? (?:it |this )?(?:plainly|directly)\b(?! (?:on|from|with|in|into|to)\b)", "plaintraining"),
        (r"\bif (?:possible|you (?:can|could|please)|that's ok(?:ay)?)\b", ""),
        (r"\boff the table\b", "off"),
        (r"\bin place of\b|\brather than\b", "instead of"),
        (r"\bopt(?:ing)? out of\b|\bget(?:ting)? rid of\b|\bstay(?:ing)? away from\b", "without"),
        (r"\b(?:turn|switch|shut|leav|tak|keep)(?:e|ing|ed)? (off|out|on)\b", r"turn \1"),
        (r"\bcannot\b", "can not"),
    )
)
_TOPIC = "automl"


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_PRONOUNS = _set("it that this")
#: Before what they negate. "out" is of "leave out", "off" of "turn off".
_NEGATIONS = _set("""
    no not non never without neither dont off out instead disable disables disabling disabled deactivate deactivating
    skip skips skipping avoid avoiding bypass bypassing omit omitting drop dropping exclude excluding ditch forget
    suppress stop cancel
""")
#: After it: they end what is said of it, and say that it is off, or on.
_ENDS_OFF = _set("off disabled deactivated skipped omitted unnecessary unneeded unwanted false out no")
_ENDS_ON = _set("on enabled true needed necessary wanted required auto fine ok okay good")
_LINKS = _set("""
    is are was be been being should must to set stay stays remain keep kept left leave turned switched turn needs need
    has have can may will would policy mode please run training job action completely entirely totally at all for now
""")
#: Between a negation and what it negates.
_FILLERS = _set("""
    the a an any all your our my its this that these model's model default built-in such more of use using used
    run running do doing go going turn turning want wanted need needed have having like prefer to on be being you
    we i it's please just ever even really actually simply dare let let's us me with via by through for automatic
    automated kind reason point think there is are should must would could can may will enable enabling start
    starting try trying route
""")
_AND = _set("or nor and / &")
_RESUME = _set("use using run running do keep enable let start try with but then only still via through")
_WANT = _set("""
    use using run running enable enabled enabling on want with via through keep need let's let do try go auto start
    prefer like by
""")
_ASKING = re.compile(r"^\s*(?:can|could|would|will|please|pls|may)\b|\bplease\b")
_SUPPOSING = re.compile(r"^\s*(?:and |or |but )?(?:if|when|whether|unless|why|what|was|were|had)\b")
_EMPTY = re.compile(r"^(?:(?:no|yes|nope|ok|okay|hmm|actually|wait|sorry|well|please|thanks|so)\b\s*)*$")
_REFUSAL = re.compile(r"^(?:no|nope|not now|not today|rather not|better not)(?: (?:thanks|thank you|please|need))?$")
_ELLIPSIS = re.compile(
    r"^\s*(?:but |please |actually )*(?:do not|don't|rather not|better not)(?: do (?:it|that|so))?\s*$"
)


@dataclass(frozen=True)
class Route:
    """Where an action runs.

    Attributes:
        policy: of this run only; what the skill says of itself does not change.
        where: ``automl``, or the action itself, which runs directly.
        reason: in words, for the user.
    """

    policy: Policy
    where: str
    reason: str


def resolve_policy(explicit: str | bool | None, words: str = "") -> tuple[Policy, str]:
    """The policy of a run, and why.

    Args:
        explicit: ``auto``, ``on`` (the same), ``off``, or None. True and False are what YAML makes of on and off.
        words: the user's request; counts where nothing is explicit.

    Raises:
        SpecError: any other value.
    """
    if explicit is not None:
        value = {True: "on", False: "off"}.get(explicit) if isinstance(explicit, bool) else explicit
        if not isinstance(value, str) or value.strip().lower() not in _VALUES:
            raise SpecError(f"automl_policy: must be auto, on or off, got {explicit!r}.", "Use off or auto.")
        return _VALUES[value.strip().lower()], f"automl_policy is {value.strip().lower()}"
    said = _read(words)
    if said is None:
        return "auto", "nothing was said against AutoML, and auto is the default"
    off, sentence = said
    return ("off", f"{sentence!r} turns AutoML off") if off else ("auto", f"{sentence!r} asks for AutoML")


def route(action: str, explicit: str | bool | None = None, words: str = "", skill: Path | None = None) -> Route:
    """Where an action of this model runs: a training whose policy is auto goes to AutoML, if that can run.

    Args:
        action: train, evaluate, ...; only train is ever routed.
        explicit, words: as in ``resolve_policy``.
        skill: folder of the skill package; None: the installed one.

    Raises:
        SpecError: ``explicit`` is none of auto, on and off.
    """
    policy, why = resolve_policy(explicit, words)
    if action != "train":
        return Route(policy, action, f"{action} is never routed to AutoML.")
    if policy == "off":
        return Route(policy, action, f"It trains once, for this run only: {why}.")
    broken = _broken(skill or SKILL)
    if broken == "disabled":
        return Route(
            policy, action, "It trains once: AutoML is not enabled for this model (references/skill_info.yaml)."
        )
    if broken:
        return Route(policy, action, f"{NOT_RUNNABLE} ({broken}). It trains once.")
    return Route(policy, "automl", f"It goes to AutoML: {why}.")


def _broken(skill: Path) -> str:
    """Why AutoML cannot run: ``disabled``, or the file that is missing or broken; empty where it can."""
    names = ("references/skill_info.yaml", "schemas/train.schema.json", "references/spec_template_train.yaml")
    for name in names:
        path = skill / name
        try:
            stat = path.stat()
        except OSError:
            return f"{name} is missing"
        tree = _parsed(path, stat.st_mtime_ns, stat.st_size)
        if not isinstance(tree, dict) or not tree:
            return f"{name} cannot be read"
        if name == names[0] and tree.get("automl_enabled") is not True:
            return "disabled"
        if name == names[1] and not isinstance(tree.get("properties"), dict):
            return f"{name} has no properties"
    return ""


@lru_cache(maxsize=16)
def _parsed(path: Path, modified: int, size: int) -> Any:
    """The content of a JSON or YAML file; None where it does not parse. Changed files are read again."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            return json.loads(text)
        return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None


def _read(words: str) -> tuple[bool, str] | None:
    """Whether the last sentence that speaks of AutoML turns it off, and that sentence; None where none does."""
    text = words.lower()
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    said: tuple[bool, str] | None = None
    asked = False  # whether the sentence before is nothing but "AutoML?"
    spoken = False  # whether "it" means AutoML
    for part in _SENTENCE.findall(text):
        sentence = " ".join(part.strip(" .,;:!?\n()").split())
        if asked and _REFUSAL.match(sentence):  # "AutoML? No, thanks."
            said, asked = (True, f"{_TOPIC}? {sentence}"), False
            continue
        asked = False
        if said and said[0] and _ELLIPSIS.match(sentence):  # "you could turn it off, but don't"
            said = (False, sentence)
            continue
        tokens = sentence.split()
        if not any(token in (_TOPIC, "plaintraining") or (spoken and token in _PRONOUNS) for token in tokens):
            spoken = spoken and bool(_EMPTY.match(sentence))
            continue
        asked = "?" in part and tokens == [_TOPIC]
        question = "?" in part and not _ASKING.search(sentence)
        if not question and not _SUPPOSING.match(sentence):
            off = _is_off(tokens, spoken)
            said = said if off is None else (off, sentence.replace("plaintraining", "plain training"))
        spoken = True
    return said


def _is_off(tokens: list[str], spoken: bool) -> bool | None:
    """What one sentence says; None: it only mentions AutoML."""
    found: bool | None = None
    negations, wanted, place = 0, False, 0
    while place < len(tokens):
        token = tokens[place]
        topic = token == _TOPIC or (spoken and token in _PRONOUNS and _stands_for(tokens, place))
        if topic or token == "plaintraining":
            after, place = _after(tokens, place + 1) if topic else (None, place + 1)
            odd = (negations + (after or 0)) % 2 == 1
            if token == "plaintraining":
                found = not odd
            elif negations or after is not None:
                found = odd
            elif wanted:
                found = False
            if not (place < len(tokens) and tokens[place] in _AND):
                negations, wanted = 0, False
            continue
        if token in _NEGATIONS or token.endswith("n't") or (token == "nor" and not negations):
            negations += 1
        elif token not in _FILLERS and token not in _AND:
            following = tokens[place + 1] if place + 1 < len(tokens) else ""
            listed = following in _AND and not (place + 2 < len(tokens) and tokens[place + 2] in _RESUME)
            negations, wanted = (negations if listed else 0), False
        wanted = wanted or token in _WANT
        place += 1
    return found


def _stands_for(tokens: list[str], place: int) -> bool:
    """Whether a pronoun is an object ("use it", "turn that off") and not an article ("this model")."""
    following = tokens[place + 1] if place + 1 < len(tokens) else ""
    return tokens[place] == "it" or not following or following in _ENDS_OFF | _ENDS_ON | _LINKS


def _after(tokens: list[str], start: int) -> tuple[int | None, int]:
    """How often what follows AutoML negates it ("is not off": 2), and where that ends; None where nothing is said."""
    count, place = 0, start
    while place < len(tokens):
        token = tokens[place]
        if token in _ENDS_ON or (token in _ENDS_OFF and not (token in ("no", "out") and place + 1 < len(tokens))):
            return count + (token in _ENDS_OFF), place + 1
        if token in ("not", "never") or token.endswith("n't"):
            count += 1
        elif token not in _LINKS:
            break
        place += 1
    return None, start
