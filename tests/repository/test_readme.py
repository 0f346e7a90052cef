"""The code of the README runs and is correct; its neighbours are in step."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import yaml

import clop_jax
from clop_jax import train
from clop_jax.data import augment
from tests import small

README = (small.ROOT / 'README.md').read_text()
# The first is a training loop of one's own, the others use the trainer.
LOOP, *TRAINER = re.findall(r'```python\n(.*?)```', README, re.DOTALL)


def test_own_loop_classifies_unlabelled_digits_by_prototype():
  names = {}
  exec(LOOP, names)
  labels, recipe = names['labels'], names['recipe']
  views = augment.whole(
    names['images'], size=8, mean=recipe.mean, std=recipe.std
  )
  nearest = jnp.argmax(names['encoder'](views) @ names['c'].T, axis=1)
  unlabelled = labels < 0
  correct = nearest == names['digits'].target
  assert unlabelled.mean() > 0.8
  assert correct[unlabelled].mean() > 0.7
  assert np.isfinite(names['value'])


class Recorded:
  """Trains for one step on 8x8 images, seconds instead of minutes."""

  def __init__(self, function):
    self.function, self.passed = function, []

  def __call__(self, config, workdir, **arguments):
    self.passed.append({*arguments})
    config = config.copy_and_resolve_references().unlock()
    config.model.name = 'tests.small:Dense'
    config.train.batch_size, config.train.num_epochs = 24, 1
    config.augment.size = config.data.image_size = 8
    config.augment.jitter_probability = 0.0  # takes long to compile
    arguments['devices'] = jax.devices()[:1]  # compiles faster than for eight
    self.function(config.lock(), workdir, watched=False, **arguments)


def test_own_data_backbone_and_loss_train(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(str(small.ROOT))  # configs
  recorded = Recorded(train.train)
  monkeypatch.setattr(train, 'train', recorded)
  rng = np.random.default_rng(0)
  photographs = rng.integers(0, 256, size=(24, 20, 24, 3)).astype(np.uint8)
  species = np.arange(24) % 4 - 1
  names = {'photographs': photographs, 'species': species.tolist()}
  for code in TRAINER:
    exec(code, names)
  assert recorded.passed == [{'source'}, {'source', 'backbone', 'contrastive'}]
  runs = tmp_path / 'runs'
  for name in ('birds', 'own'):
    assert (runs / name / 'checkpoints' / '1').is_dir()
    labels = np.load(runs / name / 'labels.npz')['labels']
    np.testing.assert_array_equal(labels, species)


def test_readme_is_short():
  assert len(README.splitlines()) < 200


def test_citation_has_the_version_of_the_package():
  citation = yaml.safe_load((small.ROOT / 'CITATION.cff').read_text())
  assert citation['version'] == clop_jax.__version__
  assert '2403.18699' in citation['abstract'] and '2403.18699' in README


def test_paths_in_the_checklists_exist():
  text = (small.ROOT / 'CONTRIBUTING.md').read_text()
  paths = re.findall(
    r'`((?:clop_jax|configs|docs|launch|tests)/[\w./]+)`', text
  )
  assert len(paths) > 30
  for path in paths:
    assert (small.ROOT / path).exists(), path
