"""Crops of images on the device, drawn and cut."""

import jax
import jax.numpy as jnp


def random_boxes(
    rng: jax.Array,
    shape: tuple[int, ...],
    area: tuple[float, float],
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
) -> jax.Array:
  """Boxes inside the unit square (Szegedy et al. 2015, section 6).

  Args:
    rng: a key.
    shape: how many boxes.
    area: range of their areas, drawn uniformly.
    aspect: range of height / width, drawn uniformly in its logarithm. A box
      that would be longer than the image is cut to it.

  Returns:
    f32[*shape, 4]: top, left, height, width.
  """
  keys = jax.random.split(rng, 3)
  size = jax.random.uniform(keys[0], shape, minval=area[0], maxval=area[1])
  low, high = jnp.log(jnp.asarray(aspect))
  ratio = jnp.exp(jax.random.uniform(keys[1], shape, minval=low, maxval=high))
  sides = jnp.stack([size * ratio, size / ratio], axis=-1)
  sides = jnp.minimum(jnp.sqrt(sides), 1.0)
  corner = jax.random.uniform(keys[2], (*shape, 2)) * (1 - sides)
  return jnp.concatenate([corner, sides], axis=-1)


def crop(image: jax.Array, box: jax.Array, side: int) -> jax.Array:
  """Cuts boxes out of images, resized linearly with antialiasing.

  Args:
    image: f32[B, H, W, C].
    box: f32[B, V, 4], V boxes an image as `random_boxes` draws them.
    side: of the crops, pixels.

  Returns:
    f32[B, V, side, side, C].
  """

  def cut(image: jax.Array, box: jax.Array) -> jax.Array:
    pixels = jnp.asarray(image.shape[:2], jnp.float32)
    scale = side / (box[2:] * pixels)
    return jax.image.scale_and_translate(
        image,
        (side, side, image.shape[-1]),
        (0, 1),
        scale,
        -box[:2] * pixels * scale,
        method="linear",
    )

  return jax.vmap(jax.vmap(cut, (None, 0)))(image, box)
