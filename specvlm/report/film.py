"""Draw a film of what the drafter saw: kept tokens bright, attention as a heat map beside them, and the growing answer.

Uses Pillow's built-in font, which covers little more than ASCII: accented letters and other scripts become boxes.
"""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from specvlm.errors import UserError
from specvlm.report.seen import Seen, View
from specvlm.types import TokenGrid

LANCZOS = Image.Resampling.LANCZOS
KINDS = (".mp4", ".gif")
SECONDS = 0.5  # how long each frame is shown
PAPER, INK, MUTED, EDGE = (20, 23, 28), (232, 234, 238), (154, 164, 178), (255, 211, 77)
COLOURS = {"accepted": (95, 207, 150), "refused": (255, 128, 137), "own": (240, 189, 92)}
HEAT = np.array([[10, 7, 40], [110, 25, 110], [230, 90, 40], [250, 240, 120]], dtype=np.float32)
PANEL, MARGIN, SIZE, LINES = 448, 16, 17, 9  # pixels; LINES: most lines of the answer that are shown
GIF = 2 / 3  # scale of a GIF: noisy pictures make large files
Word = tuple[str, str]  # kind, text
Line = list[tuple[float, str, str]]  # x, kind, text
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def kind_of(path: Path) -> str:
    """Suffix of a film file, in lower case. Raises UserError if it is not one of KINDS."""
    if path.suffix.lower() not in KINDS:
        raise UserError(f"{path}: a film ends in {' or '.join(KINDS)}")
    return path.suffix.lower()


def film(seen: Seen, path: Path) -> None:
    """Write the film of `seen.views[0]`. Raises UserError for a wrong suffix, or if there are no frames to show."""
    kind = kind_of(path)
    if not seen.frames:
        raise UserError(f"cannot show {seen.sample}: {seen.problem}")
    pictures = list(pictures_of(seen, seen.views[0]))
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == ".gif":
        size = (round(pictures[0].width * GIF), round(pictures[0].height * GIF))
        first, *others = [picture.resize(size, LANCZOS).quantize(96, dither=Image.Dither.NONE) for picture in pictures]
        first.save(path, save_all=True, append_images=others, duration=int(1000 * SECONDS), loop=0)
        return
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(1 / SECONDS).limit_denominator())
        stream.width, stream.height = pictures[0].size
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "20"}
        for picture in pictures:
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.asarray(picture), format="rgb24")):
                container.mux(packet)
        container.mux(stream.encode())


def pictures_of(seen: Seen, view: View) -> Iterator[Image.Image]:
    """Draw one picture per frame. The answer grows evenly from picture to picture; its last LINES lines are shown."""
    assert seen.grid is not None
    words = list(words_of(view))
    font = ImageFont.load_default(SIZE)
    panels = 1 if view.heat is None else 2
    tall = PANEL * seen.frames[0].height // seen.frames[0].width
    width = panels * (PANEL + MARGIN) + MARGIN
    lines = min(LINES, len(broken_into_lines(words, font, width - 2 * MARGIN)))
    height = tall + 2 * MARGIN + 24 + (SIZE + 8) * lines
    size = (width + width % 2, height + height % 2)  # yuv420p needs even sizes
    for number, (frame, place) in enumerate(zip(seen.frames, seen.shown, strict=True), start=1):
        canvas = Image.new("RGB", size, PAPER)
        pen = ImageDraw.Draw(canvas)
        image = frame.resize((PANEL, tall), LANCZOS)
        canvas.paste(dimmed(image, view, place, seen.grid), (MARGIN, MARGIN))
        if view.heat is not None:
            canvas.paste(heated(image, view.heat, place, seen.grid), (2 * MARGIN + PANEL, MARGIN))
        some, of = view.row["kept_tokens"], view.row["video_tokens"]
        kept = "" if some is None else f", {some} of {of} tokens kept"
        line = f"{view.job.label}: frame {place + 1} of {seen.grid.frames}, {seen.seconds[number - 1]:.1f} s{kept}"
        pen.text((MARGIN, tall + MARGIN + 5), line, MUTED, ImageFont.load_default(13))
        said = words[: round(len(words) * number / len(seen.frames))]
        write(pen, font, broken_into_lines(said, font, width - 2 * MARGIN)[-LINES:], MARGIN, tall + MARGIN + 30)
        yield canvas


def cells_of(values: NDArray[np.float32], place: int, grid: TokenGrid) -> NDArray[np.float32]:
    """Select the values of one frame's tokens, (height, width), from those of all tokens, (N,).

    place: Index of the frame.
    """
    start = place * grid.per_frame
    return values[start : start + grid.per_frame].reshape(grid.height, grid.width)


def stretched(cells: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Scale the values of one frame's tokens up to `size`, (width, height) in pixels, without smoothing."""
    return np.asarray(Image.fromarray(cells).resize(size, Image.Resampling.NEAREST))


def dimmed(image: Image.Image, view: View, place: int, grid: TokenGrid) -> Image.Image:
    """Darken dropped tokens and draw an edge around kept ones. Returns the image itself if no pruner was used."""
    if view.kept is None:
        return image
    kept = np.zeros(len(grid), dtype=np.float32)
    kept[list(view.kept)] = 1
    mask = stretched(cells_of(kept, place, grid), image.size)
    pixels = np.asarray(image, dtype=np.float32) * (0.25 + 0.75 * mask[..., None])
    border = np.zeros(mask.shape, dtype=bool)
    border[1:] |= mask[1:] != mask[:-1]
    border[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    pixels[border] = EDGE
    return Image.fromarray(pixels.astype(np.uint8))


def heated(image: Image.Image, heat: NDArray[np.float32], place: int, grid: TokenGrid) -> Image.Image:
    """Overlay attention as colour. heat: of all tokens, (N,); the scale ends at its 99th percentile."""
    share = (heat / max(float(np.quantile(heat, 0.99)), 1e-6)).clip(0, 1)
    value = stretched(cells_of(share.astype(np.float32), place, grid), image.size)
    stops = np.linspace(0, 1, len(HEAT))
    colour = np.stack([np.interp(value, stops, HEAT[:, channel]) for channel in range(3)], -1)
    cover = (0.62 + 0.2 * value)[..., None]
    return Image.fromarray((np.asarray(image) * (1 - cover) + colour * cover).astype(np.uint8))


def words_of(view: View) -> Iterator[Word]:
    """Yield the texts of all rounds in order, each with its kind: accepted, refused, or own (the target's token)."""
    for one in view.rounds:
        yield from (("accepted", text) for text in one.accepted)
        yield from (("refused", text) for text in one.refused)
        if one.own:
            yield "own", one.own


def broken_into_lines(words: Sequence[Word], font: Font, wide: float) -> list[Line]:
    """Break words into lines of at most `wide` pixels (or one longer word), each word with its x position."""
    lines: list[Line] = [[]]
    x = 0.0
    for kind, text in words:
        if x + font.getlength(text) > wide and lines[-1]:
            lines.append([])
            x, text = 0.0, text.lstrip()
        lines[-1].append((x, kind, text))
        x += font.getlength(text)
    return lines


def write(pen: ImageDraw.ImageDraw, font: Font, lines: Sequence[Line], left: int, top: int) -> None:
    """Draw lines of text; strike refused words through. left, top: corner of the text in pixels."""
    for row, line in enumerate(lines):
        y = top + row * (SIZE + 8)
        for x, kind, text in line:
            pen.text((left + x, y), text, COLOURS[kind], font)
            if kind == "refused":
                start, end = font.getlength(text[: len(text) - len(text.lstrip())]), font.getlength(text)
                pen.line((left + x + start, y + SIZE * 0.62, left + x + end, y + SIZE * 0.62), COLOURS[kind], 1)
