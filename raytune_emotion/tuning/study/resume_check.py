"""Check a request to resume a study against its spec, without slow imports."""

from pathlib import Path

from raytune_emotion.errors import UserError, collect_errors
from raytune_emotion.storage.locations import Location, parent_of
from raytune_emotion.terminal import shell_word, typed_command
from raytune_emotion.tuning.space.parser import load_space, parse_space
from raytune_emotion.tuning.space.space import Space
from raytune_emotion.tuning.study.database import split_address
from raytune_emotion.tuning.study.request import SearchRequest, absolute_path
from raytune_emotion.tuning.study.spec import SPEC, StudySpec, read_spec

_WEIGHTS, _PRETRAINED = "model.weights_dir", "model.pretrained"
#: Settings that the command line may set, so that a study may have other values than its space.
_OUTSIDE_THE_SPACE = ("train.epochs", "train.seed", _WEIGHTS)


def check_continuation(request: SearchRequest, place: Location) -> None:
    """Check, before a study is loaded, that it can be resumed as requested.

    Raises:
        UserError: all errors that its spec shows.
    """
    names = [SPEC]
    if request.warm_start:
        from raytune_emotion.tuning.policy.warm_start import EARLIER  # imported only now: it takes a second

        names.append(EARLIER)
    with place.work_here(*names) as folder:
        try:
            spec = read_spec(folder)
            refuse_confirmation(spec, place)
            errors = refused_changes(request, spec, folder)
        except UserError as error:
            raise UserError(fault.replace(str(folder), str(place)) for fault in error.faults) from None
    if errors:
        raise UserError(errors)


def refuse_confirmation(spec: StudySpec, place: Location) -> None:
    """Refuse to resume a confirmation as a search.

    Raises:
        UserError: the study is a confirmation.
    """
    if spec.confirms is not None:
        study = str(parent_of(place))
        raise UserError(
            f"{place}: is a confirmation; continue it with `{typed_command('confirm')} {shell_word(study)}`"
        )


def refused_changes(request: SearchRequest, spec: StudySpec, folder: Path) -> list[str]:
    """List the errors of options that a resumed study cannot change. Repeated values of the study are no errors.

    Args:
        request: the request.
        spec: spec of the study.
        folder: folder of the study, with its warm start.
    """
    kept = ("objective", "sampler", "scheduler", "seed")
    wanted, has = ({name: getattr(its, name) for name in kept} for its in (request, spec))
    changed = [
        f"{name} that it began with, {has[name]}" for name, value in wanted.items() if value not in (None, has[name])
    ]
    errors: list[str] = []
    space = parse_space(spec.space, str(folder / SPEC))
    if request.space is not None:
        # These settings of the study come from the command line, or may change.
        own = {key: value for key, value in space.fixed_settings.items() if key in _OUTSIDE_THE_SPACE}
        began_with = space.to_dict()
        if (weights := absolute_path(request.weights_dir) or spec.weights_dir) is not None:
            # Use the present folder of the weights: the original folder may be missing.
            own[_WEIGHTS] = began_with[_WEIGHTS] = weights
        with collect_errors(errors):
            if load_space(request.space, overrides=own).to_dict() != began_with:
                changed.append("space that it began with")
    url = split_address(spec.storage)[0] if spec.storage else None
    if request.storage not in (None, url):
        changed.append(f"storage that it began with, {url or 'its own journal'}")
    if request.warm_start:
        from raytune_emotion.tuning.policy.warm_start import NOTHING, name_earlier

        began = name_earlier(folder)
        if began != (", ".join(study.address for study in request.earlier_studies) or NOTHING):
            changed.append(f"warm-start that it began with, {began}")
    errors += [
        f"--{what.partition(' ')[0]}: a study keeps the {what}; leave the option out, or begin a new study under "
        f"another name"
        for what in changed
    ]
    with collect_errors(errors):
        request.check_warm_start()
    if request.weights_dir is not None and spec.weights_dir is None and not _decides_on_weights(space):
        errors.append(
            f"--weights-dir: trials of this study begin with random weights, because it began with neither "
            f"--weights-dir nor {_PRETRAINED}; leave the option out, or begin a new study under another name"
        )
    if request.epochs is not None and request.epochs < spec.epochs:
        errors.append(f"--epochs: a resumed study cannot have fewer epochs than before ({spec.epochs}); raise them")
    with collect_errors(errors):
        request.check_until_gain(spec.objective)
    return errors


def _decides_on_weights(space: Space) -> bool:
    """Tell whether the space itself says for each trial whether it begins with pretrained weights."""
    return all(_PRETRAINED in space.active_settings(decided) for decided in space.decisions())
