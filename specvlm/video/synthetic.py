"""Generate short synthetic videos with exact captions, for the embedded model pairs.

One to five coloured shapes appear at distinct seconds, stay, move between nine places or change colour, and most of
them disappear again. The results of `sample_scene`, `questions` and `render` depend only on their arguments. Seeds
below `HELD_OUT` are never used in training.

Legend: B scenes, K object slots, C columns of an object row, T frames, S side of a sprite box in pixels.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

SECONDS, FPS, SIDE, MAX_OBJECTS = 16, 2, 224, 5
HELD_OUT = 1_000_000
NOISE = 4.0  # standard deviation in 8-bit steps
SPRITE = 46  # side in pixels of the box that an object is drawn in: the largest radius is 16, and the box is rounded

SHAPES = ["circle", "square", "triangle", "cross", "ring", "diamond", "star", "bar"]
COLORS = {"red": (225, 45, 45), "green": (50, 200, 70), "blue": (70, 110, 255), "yellow": (245, 220, 50),
          "orange": (255, 140, 30), "purple": (175, 75, 230), "white": (245, 245, 245), "cyan": (60, 220, 230)}  # fmt: skip
BACKGROUNDS = {"black": (16, 16, 18), "gray": (105, 105, 110), "navy": (18, 26, 84), "maroon": (84, 18, 28),
               "forest": (16, 66, 30), "brown": (98, 68, 38)}  # fmt: skip
TEXTURES = ["plain", "striped", "checkered"]
SIZES, RADII = ["small", "medium", "large"], [7.0, 11.0, 16.0]
PLACES = [f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "center", "right")]
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
           "thirteen", "fourteen", "fifteen"]  # fmt: skip
COLOR_NAMES, BACKGROUND_NAMES = list(COLORS), list(BACKGROUNDS)

SYSTEM = "you watch a short video and answer ."
CAPTION_QUESTIONS = (
    "describe the video .", "describe this video .", "describe what happens in the video .", "what happens in the video ?",
    "what happens in this video ?", "tell me what happens in the video .", "give a full account of the scene .",
    "describe the scene in full .",
)  # fmt: skip
SPECIAL_TOKENS = ["<|endoftext|>", "<unk>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
                  "<|video_pad|>", "<|image_pad|>", "<video>", "<image>"]  # fmt: skip
_PHRASES = """system user assistant up down left right . , ? describe the this what happens in tell me about give full
account of object objects appear appears on background at second stays there moves to from then turns disappears remain
remains until end and scene is empty many how where does which color shape move yes no it changes not first last that be with
an a one"""
_NAMES = (SHAPES, COLORS, BACKGROUNDS, TEXTURES, SIZES, PLACES, NUMBERS, CAPTION_QUESTIONS, (SYSTEM, _PHRASES))
VOCABULARY = SPECIAL_TOKENS + sorted({word for names in _NAMES for name in names for word in name.split()})


@dataclass(frozen=True)
class Thing:
    """One object of a scene.

    Attributes:
        second: Whole second from which the object is shown.
        end: Whole second from which the object is no longer shown.
        shape: Index in SHAPES.
        color: Index in COLORS.
        size: Index in SIZES.
        start: First place, an index in PLACES.
        stop: Last place, an index in PLACES.
        turn: Index in COLORS of the colour that the object changes to halfway; None if it does not.
        stays: True if the object is still there when the video ends.
        jitter: Offset in pixels from the centre of the first place (x, y) and of the last place (x, y).
    """

    second: int
    end: int
    shape: int
    color: int
    size: int
    start: int
    stop: int
    turn: int | None
    stays: bool
    jitter: tuple[float, float, float, float]

    @property
    def moves(self) -> bool:
        """True if the object changes its place."""
        return self.start != self.stop


@dataclass(frozen=True)
class Scene:
    """A background with objects.

    Attributes:
        background: Index in BACKGROUNDS.
        texture: Index in TEXTURES.
        phase: Pixels by which the texture is shifted.
        things: The objects, sorted by the second in which they appear.
        seconds: Duration in seconds.
    """

    background: int
    texture: int
    phase: int
    things: tuple[Thing, ...]
    seconds: int = SECONDS


def sample_scene(seed: int | random.Random, seconds: int = SECONDS, min_objects: int = 1) -> Scene:
    """Sample a scene of 1 to 5 objects. No two appear in the same second, or share a place while both are shown.

    Args:
        seed: A seed, or a generator to draw from.
        seconds: Duration in seconds, 3 to 16.
        min_objects: Minimum number of objects, 1 to 5. A scene has at most `seconds` - 2, whatever the minimum.

    Raises:
        ValueError: `seconds` is out of range.
    """
    if not 3 <= seconds <= SECONDS:
        raise ValueError(f"seconds={seconds}: a scene lasts 3 to {SECONDS} seconds")
    rng = seed if isinstance(seed, random.Random) else random.Random(seed)
    while True:
        count = rng.choices(range(1, MAX_OBJECTS + 1), [8, 18, 26, 26, 22])[0]
        count = min(max(count, min_objects), seconds - 2)
        colors = rng.sample(range(len(COLORS)), count + 2)  # the last two are for colour changes
        things: list[Thing] = []
        for i, second in enumerate(sorted(rng.sample(range(seconds - 2), count))):
            thing = _sample_thing(rng, second, seconds, colors[i], colors[count:], things)
            if thing is not None:
                things.append(thing)
        scene = Scene(rng.randrange(6), rng.randrange(3), rng.randrange(16), tuple(things), seconds)
        if len(things) >= min(min_objects, seconds - 2):
            return scene


def _sample_thing(
    rng: random.Random, second: int, seconds: int, color: int, spare: list[int], others: list[Thing]
) -> Thing | None:
    """Sample an object that appears at a second; None if 30 attempts find no places that `others` leave free."""
    rest = seconds - second
    vanishes = rng.random() < 0.85 and rest >= 3
    life = min(rng.randint(2, 5), rest - 1) if vanishes else rest  # leave at least one second without it
    shape, size, moves = rng.randrange(8), rng.choices(range(3), [4, 3, 3])[0], rng.random() < 0.55
    for _ in range(30):
        start = rng.randrange(9)
        stop = rng.randrange(9) if moves else start
        clash = any(second < o.end and {start, stop} & {o.start, o.stop} for o in others)
        if (start != stop) == moves and not clash:
            break
    else:
        return None
    turned = sum(o.turn is not None for o in others)
    turn = spare[turned] if not moves and life >= 4 and turned < 2 and rng.random() < 0.3 else None
    jitter = (rng.uniform(-5, 5), rng.uniform(-5, 5), rng.uniform(-5, 5), rng.uniform(-5, 5))
    return Thing(second, second + life, shape, color, size, start, stop, turn, not vanishes, jitter)


def _direction(thing: Thing) -> str:
    """Say in which direction an object moves, such as "up left"."""
    (row0, col0), (row1, col1) = divmod(thing.start, 3), divmod(thing.stop, 3)
    vertical = "down" if row1 > row0 else "up" if row1 < row0 else ""
    horizontal = "right" if col1 > col0 else "left" if col1 < col0 else ""
    return f"{vertical} {horizontal}".strip()


def _events(thing: Thing) -> str:
    """Say what an object does, from its appearance to the end."""
    text = f"at second {NUMBERS[thing.second]} a {SIZES[thing.size]} {COLOR_NAMES[thing.color]} {SHAPES[thing.shape]}"
    text += f" appears at the {PLACES[thing.start]}"
    if thing.moves:
        text += f" , moves {_direction(thing)} to the {PLACES[thing.stop]}"
    elif thing.turn is not None:
        text += f" , turns {COLOR_NAMES[thing.turn]}"
    else:
        text += " , stays there"
    return text + _fate(thing)


def _fate(thing: Thing) -> str:
    return " and remains until the end ." if thing.stays else " and then disappears ."


def _opening(scene: Scene) -> str:
    count = len(scene.things)
    verb = "object appears" if count == 1 else "objects appear"
    return f"{NUMBERS[count]} {verb} on a {TEXTURES[scene.texture]} {BACKGROUND_NAMES[scene.background]} background ."


def caption(scene: Scene) -> str:
    """Return the full caption of a scene, 36 to 140 words separated by single spaces.

    The first word is the number of objects. It depends on every object, which makes the target's attention informative.
    """
    left = sum(t.stays for t in scene.things)
    ending = "the scene is empty" if left == 0 else "one object remains" if left == 1 else f"{NUMBERS[left]} objects remain"
    return " ".join([_opening(scene), *map(_events, scene.things), f"at the end {ending} ."])


def questions(scene: Scene, seed: int | random.Random) -> list[tuple[str, str]]:
    """Return five (question, answer) pairs, one of each kind, in random order, about randomly chosen objects."""
    rng = seed if isinstance(seed, random.Random) else random.Random(seed)
    pairs = []
    for kind in rng.sample(range(5), 5):
        thing = rng.choice(scene.things)
        color, place, second = COLOR_NAMES[thing.color], PLACES[thing.start], NUMBERS[thing.second]
        named = f"{color} {SHAPES[thing.shape]}"
        if kind == 0:
            pair = f"where does the {named} appear ?", f"the {named} appears at the {place} at second {second} ."
        elif kind == 1:
            pair = f"what happens at second {second} ?", _events(thing)
        elif kind == 2:
            moved = f"yes , the {color} object moves {_direction(thing)} from the {place} to the {PLACES[thing.stop]} ."
            pair = (
                f"does the {color} object move ?",
                moved if thing.moves else f"no , the {color} object stays at the {place} .",
            )
        elif kind == 3:
            what = f"it is a {SIZES[thing.size]} {named} that appears at second {second} at the {place}"
            pair = f"what is the {color} object ?", what + _fate(thing)
        else:
            pair = "how many objects appear ?", _opening(scene)
        pairs.append(pair)
    return pairs


class Col(IntEnum):
    """Columns of an object row (see `pack`). In unused rows, ON is 0. Frame numbers are at 2 fps, positions in pixels.

    The object is shown from frame FIRST to LAST - 1, moves from (X0, Y0) at frame MOVE0 to (X1, Y1) at MOVE1, and has
    the colour TURN from TURN_FRAME on. The other columns are fields of `Thing`.
    """

    ON, SHAPE, COLOR, SIZE, TURN, TURN_FRAME, FIRST, LAST, X0, Y0, X1, Y1, MOVE0, MOVE1, START, STOP, SECOND, STAYS = range(18)


def pack(scenes: list[Scene]) -> tuple[np.ndarray, np.ndarray]:
    """Encode scenes: objects as float32 (B, K, C) by `Col`; background, texture and phase as int64 (B, 3)."""
    objects = np.zeros((len(scenes), MAX_OBJECTS, len(Col)), np.float32)
    for b, scene in enumerate(scenes):
        for k, o in enumerate(scene.things):
            x0, y0 = (SIDE / 6 + o.start % 3 * SIDE / 3 + o.jitter[0], SIDE / 6 + o.start // 3 * SIDE / 3 + o.jitter[1])
            x1, y1 = (SIDE / 6 + o.stop % 3 * SIDE / 3 + o.jitter[2], SIDE / 6 + o.stop // 3 * SIDE / 3 + o.jitter[3])
            if not o.moves:
                x1, y1 = x0, y0
            first, last = FPS * o.second, FPS * o.end
            turn_frame = 999 if o.turn is None else (first + last) // 4 * 2
            objects[b, k] = (1, o.shape, o.color, o.size, o.turn or 0, turn_frame, first, last, x0, y0, x1, y1,
                             first + 1, last - 2, o.start, o.stop, o.second, o.stays)  # fmt: skip
    return objects, np.array([(s.background, s.texture, s.phase) for s in scenes], np.int64)


def centers(objects: Tensor, frames: Tensor) -> Tensor:
    """Return the objects' centres (x, y) in pixels at the frame numbers (T,), as (B, K, T, 2)."""
    start, stop = objects[..., Col.MOVE0, None], objects[..., Col.MOVE1, None]
    way = ((frames - start) / (stop - start).clamp(min=1)).clamp(0, 1)[..., None]
    from_, to = objects[:, :, None, Col.X0 : Col.Y0 + 1], objects[:, :, None, Col.X1 : Col.Y1 + 1]
    return from_ + way * (to - from_)


def coverage(shape: Tensor, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Return the opacity 0..1 of shapes at pixel offsets x, y from their centre; all arguments broadcast.

    Args:
        shape: Indices in SHAPES.
        x: Pixels to the right of the centre.
        y: Pixels below the centre.
        radius: Radius in pixels.
    """
    ax, ay, far = x.abs(), y.abs(), (x * x + y * y).sqrt()
    fifth = 2 * torch.pi / 5
    spoke = ((torch.atan2(x + 0 * y, -y + 0 * x) % fifth) - fifth / 2).abs() / (fifth / 2)
    distances = (
        far - radius,
        torch.maximum(ax, ay) - 0.86 * radius,
        torch.maximum(ax * 0.894 + y * 0.447 - 0.45 * radius, y - 0.75 * radius),
        torch.minimum(
            torch.maximum(ax - 0.95 * radius, ay - 0.3 * radius), torch.maximum(ax - 0.3 * radius, ay - 0.95 * radius)
        ),
        (far - 0.75 * radius).abs() - 0.24 * radius,
        (ax + ay - 1.05 * radius) * 0.7071,
        far - radius * (0.43 + 0.62 * spoke),
        torch.maximum(ax - radius, ay - 0.32 * radius),
    )
    distance = distances[0]
    for i, other in enumerate(distances[1:], 1):
        distance = torch.where(shape == i, other, distance)
    return (0.5 - distance).clamp(0, 1)


def canvas(backgrounds: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw empty scenes (B, 3, SIDE, SIDE) in 0..255. A lighter border lets a vision tower see where the edges are."""
    device = backgrounds.device
    y, x = torch.meshgrid(torch.arange(SIDE, device=device), torch.arange(SIDE, device=device), indexing="ij")
    name, texture, phase = (c.view(-1, 1, 1) for c in backgrounds.unbind(1))
    stripes = (x + y + phase) // 12 % 2 * 2 - 1
    checks = ((x + phase) // 16 + (y + phase) // 16) % 2 * 2 - 1
    pattern = torch.where(texture == 1, stripes, torch.where(texture == 2, checks, 0)) * 7
    colors = torch.tensor(list(BACKGROUNDS.values()), device=device)[name.view(-1)]
    base = colors[:, :, None, None] + pattern[:, None]
    edge = torch.minimum(torch.minimum(x, SIDE - 1 - x), torch.minimum(y, SIDE - 1 - y))
    return torch.where(edge < 4, base + 70 - 10 * edge, base).to(dtype)


def draw(
    objects: Tensor,
    backgrounds: Tensor,
    frames: Tensor,
    dtype: torch.dtype = torch.float32,
    cover: Callable[..., Tensor] = coverage,
) -> Tensor:
    """Draw frames without noise, (B, T, 3, SIDE, SIDE) in 0..255. Cheap: objects are drawn only in their boxes.

    Args:
        objects: (B, K, C), from `pack`.
        backgrounds: (B, 3), from `pack`.
        frames: (T,) Frame numbers.
        dtype: Data type of the result.
        cover: Function that gives the opacity of shapes: `coverage`, or a compiled version of it.
    """
    device, batch, count = objects.device, len(objects), len(frames)
    video = canvas(backgrounds, dtype)[:, None].expand(-1, count, -1, -1, -1).clone()
    palette = torch.tensor(list(COLORS.values()), device=device, dtype=torch.float32)
    radii, box = torch.tensor(RADII, device=device), torch.arange(SPRITE, device=device)
    center = centers(objects, frames)
    b, t, c = (torch.arange(n, device=device) for n in (batch, count, 3))
    for k in range(MAX_OBJECTS):
        o = objects[:, k]
        visible = (o[:, None, Col.ON] > 0) & (frames >= o[:, None, Col.FIRST]) & (frames < o[:, None, Col.LAST])
        corner = (center[:, k] - SPRITE / 2).floor().clamp(0, SIDE - SPRITE).long()
        px, py = corner[..., 0:1] + box, corner[..., 1:2] + box
        dx, dy = px + 0.5 - center[:, k, :, 0:1], py + 0.5 - center[:, k, :, 1:2]
        shape, radius = (v.repeat_interleave(count).view(-1, 1, 1) for v in (o[:, Col.SHAPE], radii[o[:, Col.SIZE].long()]))
        alpha = cover(shape, dx.view(-1, 1, SPRITE), dy.view(-1, SPRITE, 1), radius)
        alpha = (alpha.view(batch, count, 1, SPRITE, SPRITE) * visible[:, :, None, None, None]).to(dtype)
        turned = frames >= o[:, None, Col.TURN_FRAME]
        before, after = (palette[o[:, None, column].long()] for column in (Col.COLOR, Col.TURN))
        color = torch.where(turned[..., None], after, before).to(dtype)
        rows, columns = py[:, :, None, :, None], px[:, :, None, None, :]
        at = (b.view(-1, 1, 1, 1, 1), t.view(1, -1, 1, 1, 1), c.view(1, 1, -1, 1, 1), rows, columns)
        video[at] = video[at] * (1 - alpha) + color[..., None, None] * alpha
    return video


def render(scene: Scene, seed: int = 0) -> np.ndarray:
    """Render a video as uint8 (T, SIDE, SIDE, 3) at 2 frames per second, with seeded noise. Takes up to 0.3 s."""
    objects, backgrounds = (torch.from_numpy(a) for a in pack([scene]))
    video = draw(objects, backgrounds, torch.arange(scene.seconds * FPS).float())[0]
    video += NOISE * torch.randn(video.shape, generator=torch.Generator().manual_seed(seed))
    return video.clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
