"""The config in a run's folder. What refuses a folder by it needs neither timm nor a trainer, which take seconds to import."""

import json
from pathlib import Path

from dist_contrastive.config import MethodConfig, TrainConfig, UserError, from_dict, require
from dist_contrastive.methods import METHODS
from dist_contrastive.run_folder.names import CONFIG


def read_config(run: Path) -> TrainConfig:
    """The config of a run's folder; `UserError` where there is none that this version reads."""
    path = run / CONFIG
    require(path.is_file(), f"{run} is no run's folder: it has no {CONFIG}")
    try:
        data = json.loads(path.read_bytes())
        name = data["method"]["name"]
        require(name in METHODS, f"{path} names method {name}; this version has {', '.join(METHODS)}")
        method: type[MethodConfig] = METHODS[name].Config
        config: TrainConfig = from_dict(TrainConfig, data, method)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a config that training wrote ({error})") from error
    return config
