"""The models. A new one is one file in this folder and one line here."""

from perturbray.models import baselines as baselines
from perturbray.models import bilinear as bilinear
from perturbray.models import biolord as biolord
from perturbray.models import cpa as cpa
from perturbray.models import decoder_only as decoder_only
from perturbray.models import latent_additive as latent_additive
from perturbray.models import linear_additive as linear_additive
from perturbray.models import linear_plain as linear_plain
from perturbray.models import neighbours as neighbours
from perturbray.models import sams_vae as sams_vae
from perturbray.models.base import MODELS as MODELS
from perturbray.models.base import GradientModel as GradientModel
from perturbray.models.base import Model as Model
from perturbray.models.base import ModelSpec as ModelSpec
from perturbray.models.base import StreamingModel as StreamingModel
