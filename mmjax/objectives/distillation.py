"""Does a student see in a part what its teacher sees in the whole?"""

import jax
import jax.numpy as jnp


def cross_entropy(
    student: jax.Array,
    teacher: jax.Array,
    centre: jax.Array,
    *,
    student_temperature: float = 0.1,
    teacher_temperature: float = 0.04,
) -> jax.Array:
  """Of the teacher's choice among prototypes, in float32 (DINO, section 3.1).

  The teacher's logits are centred, so that no prototype takes all, and
  sharpened, so that not all are alike (Caron et al. 2021).

  Args:
    student: [..., K], cosines with the prototypes.
    teacher: [..., K], likewise; no gradient flows into it.
    centre: f32[K], the mean of the teacher's logits, see `moved_centre`.
    student_temperature: of the student.
    teacher_temperature: of the teacher.

  Returns:
    f32[...], in nats.
  """
  teacher = jax.lax.stop_gradient(teacher.astype(jnp.float32))
  target = jax.nn.softmax((teacher - centre) / teacher_temperature)
  guess = student.astype(jnp.float32) / student_temperature
  return -(target * jax.nn.log_softmax(guess)).sum(axis=-1)


def moved_centre(
    centre: jax.Array, mean: jax.Array, momentum: float = 0.9
) -> jax.Array:
  """The centre f32[K] after a batch whose teacher logits had this mean."""
  return momentum * centre + (1 - momentum) * jax.lax.stop_gradient(mean)
