"""The matrix: which clips are made, as a table.

A cell is a container, an encoding and what was done to the file afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

# Frame N has luma 20 + 4 N, the 50th 20 again. The lit and tinted block in the upper left shows how a picture is turned.
_BLOCK = "lt(X\\,W/3)*lt(Y\\,H/3)"
_PICTURE = f"geq=lum='20+4*mod(N\\,50)+20*{_BLOCK}':cb='128-40*{_BLOCK}':cr=128"
_SIZE, _RATE, _FRAMES = "96x64", "10", 50

DRAWINGS = {  # size, rate, number of frames, filters behind
    "": (_SIZE, _RATE, _FRAMES, ""),
    "pal": (_SIZE, "25", 75, ""),
    "ntsc": (_SIZE, "30000/1001", 90, ""),
    "slow": (_SIZE, "1", 30, ""),
    "fast": (_SIZE, "60", 150, ""),
    "vfr": (_SIZE, _RATE, _FRAMES, ",settb=1/50,setpts='5*N+2*mod(N\\,3)+20*gte(N\\,20)'"),
    "crowded": (_SIZE, _RATE, _FRAMES, ",settb=1/4000,setpts=N"),  # more than one a millisecond, as Matroska counts them
    "late": (_SIZE, _RATE, _FRAMES, ",setpts=PTS+10/TB"),
    "odd": ("98x66", _RATE, 30, ""),
    "wide": (_SIZE, _RATE, 30, ",setsar=2"),
    "one": (_SIZE, _RATE, 1, ""),
    "two": (_SIZE, _RATE, 2, ""),
}

ENCODINGS = {
    "h264": "-c:v libx264 -g 10 -bf 0",
    "h264_long": "-c:v libx264 -g 50 -bf 0",
    "h264_b": "-c:v libx264 -g 10 -bf 3",
    "h264_open": "-c:v libx264 -bf 3 -x264-params open-gop=1:keyint=10:scenecut=0",
    "h264_refresh": "-c:v libx264 -bf 0 -x264-params intra-refresh=1:keyint=10:scenecut=0",
    "h264_10bit": "-c:v libx264 -g 10 -bf 3 -pix_fmt yuv420p10le",
    "h264_444": "-c:v libx264 -g 10 -bf 3 -pix_fmt yuv444p",
    "h264_full": "-c:v libx264 -g 10 -bf 3 -pix_fmt yuvj420p",
    "h264_709": "-c:v libx264 -g 10 -bf 3 -colorspace bt709 -color_primaries bt709 -color_trc bt709",
    "h264_rgb": "-c:v libx264rgb -g 10 -bf 3 -pix_fmt rgb24",
    "hevc": "-c:v libx265 -tag:v hvc1 -x265-params log-level=0:open-gop=0:keyint=10:bframes=3",
    "hevc_open": "-c:v libx265 -x265-params log-level=0:open-gop=1:keyint=10:bframes=3",
    "mpeg4": "-c:v mpeg4 -g 10 -q:v 2",
    "mpeg4_b": "-c:v mpeg4 -bf 2 -g 10 -q:v 2",
    "xvid_packed": "-c:v libxvid -bf 2 -g 10 -q:v 2",
    "mpeg2_open": "-c:v mpeg2video -bf 2 -g 10 -q:v 2",
    "mpeg2_closed": "-c:v mpeg2video -bf 2 -g 10 -q:v 2 -flags +cgop -sc_threshold 1000000000",
    "mpeg1": "-c:v mpeg1video -bf 2 -g 10 -q:v 2",
    "vp8": "-c:v libvpx -g 10 -deadline realtime -cpu-used 8",
    "vp8_hidden": "-c:v libvpx -g 20 -auto-alt-ref 1 -lag-in-frames 10",
    "vp9": "-c:v libvpx-vp9 -g 10 -deadline realtime -cpu-used 8",
    "vp9_hidden": "-c:v libvpx-vp9 -g 20 -auto-alt-ref 1 -lag-in-frames 10",
    "av1": "-c:v libaom-av1 -g 10 -cpu-used 8 -lag-in-frames 10",
    "vvc": "-c:v libvvenc -preset faster -pix_fmt yuv420p10le",
    "wmv1": "-c:v wmv1 -g 10 -q:v 2",
    "wmv2": "-c:v wmv2 -q:v 2",
    "msmpeg4": "-c:v msmpeg4 -g 10 -q:v 2",
    "flv1": "-c:v flv1 -g 10 -q:v 2",
    "theora": "-c:v libtheora -g 10 -q:v 8",
    "mjpeg": "-c:v mjpeg -q:v 2 -pix_fmt yuvj420p",
    "prores": "-c:v prores_ks -pix_fmt yuv422p10le",
    "ffv1": "-c:v ffv1 -g 1",
    "huffyuv": "-c:v huffyuv -pix_fmt yuv422p",
    "png": "-c:v png -pix_fmt rgb24",
    "gif": "-c:v gif -pix_fmt rgb8",
    "apng": "-c:v apng -pix_fmt rgb24",
    "raw": "-c:v rawvideo",
}

CONTAINERS = {  # the ending of the name, and words for the muxer
    "mp4": ("mp4", ""),
    "faststart": ("mp4", "-movflags +faststart"),
    "fragmented": ("mp4", "-movflags +frag_keyframe+empty_moov+default_base_moof"),
    "dash": ("mp4", "-movflags +dash+frag_keyframe+empty_moov"),
    "negative_cts": ("mp4", "-movflags +negative_cts_offsets"),
    "no_edit_list": ("mp4", "-use_editlist 0"),
    "mov": ("mov", ""),
    "3gp": ("3gp", ""),
    "mkv": ("mkv", ""),
    "webm": ("webm", ""),
    "live_webm": ("webm", "-live 1"),
    "avi": ("avi", ""),
    "ts": ("ts", ""),
    "m2ts": ("m2ts", "-mpegts_m2ts_mode 1"),
    "mpg": ("mpg", ""),
    "vob": ("vob", "-f vob"),
    "flv": ("flv", ""),
    "ogv": ("ogv", ""),
    "gif": ("gif", ""),
    "apng": ("apng", ""),
    "wmv": ("wmv", ""),
    "nut": ("nut", ""),
    "mxf": ("mxf", ""),
    "y4m": ("y4m", ""),
    "ivf": ("ivf", ""),
    "obu": ("obu", ""),
    "h264": ("h264", ""),
    "hevc": ("hevc", ""),
    "m4v": ("m4v", ""),
    "m2v": ("m2v", ""),
    "mjpeg": ("mjpeg", ""),
}

# container | encodings, with @drawing where it is not the plain one | what is done to the file (see edits.py)
_TABLE = """
mp4          | h264 h264_long h264_b h264_open hevc hevc_open mpeg4_b   | whole cut cut_between tail
mp4          | h264_b@ntsc h264_b@slow h264_b@fast h264_b@vfr h264@late | whole cut
mp4          | h264@crowded h264_b@odd h264_b@wide h264@one h264_b@two h264_10bit h264_444 h264_full h264_709 h264_rgb | whole
mp4          | vp9 vp9_hidden av1 mjpeg vvc xvid_packed mpeg2_open@pal h264_refresh | whole cut
mp4          | h264_b      | hflip vflip turn90 turn180 turn270 turn90_hflip turn90_vflip turn180_hflip turn45
mp4          | h264_b      | matrix_scaled matrix_shifted matrix_empty matrix_slanted
mp4          | h264_b@odd  | turn90 turn270_hflip
mp4          | h264_b      | sei_turn90 sei_hflip sei_turn90_vflip late negative joined copied_middle holes
mp4          | h264_b      | tagged zeros padded_mdat long_size endless_mdat truncated
mp4          | h264 h264_b | edit_start edit_between edit_end edit_twice edit_skip edit_delay edit_still
mp4          | h264_b      | decoy decoy_last decoy_bigger decoy_both cover audio audio_cut subtitles resized
faststart    | h264_b      | whole tagged zeros truncated
fragmented   | h264 h264_b hevc_open | whole cut piped tagged
dash         | h264_b h264_b@vfr | whole
negative_cts | h264_b hevc_open | whole cut
no_edit_list | h264_b hevc_open | whole cut
mov          | h264_b prores png mjpeg | whole cut turn90_hflip
3gp          | mpeg4       | whole cut
mkv          | h264_long h264_b h264_open hevc_open mpeg4_b ffv1 | whole cut copied_middle
mkv          | h264_b@vfr h264_b@late av1 xvid_packed | whole cut
mkv          | h264_b      | hflip vflip turn90 turn270_vflip joined tail piped tagged truncated holes
mkv          | h264@crowded | whole
mkv          | h264_b      | decoy decoy_last decoy_both cover audio_cut
webm         | vp8 vp8_hidden vp9 vp9_hidden av1 | whole cut
live_webm    | vp8 vp9_hidden | whole piped cut
avi          | h264_long h264_b mpeg4 mpeg4_b xvid_packed mjpeg huffyuv msmpeg4 raw | whole cut piped
avi          | mpeg4_b@vfr mpeg4@vfr mpeg4_b@ntsc mpeg4@one | whole
avi          | mpeg4_b     | joined tagged zeros audio copied_middle truncated
ts           | h264_long h264_b h264_open hevc_open mpeg2_open@pal | whole cut headless
ts           | h264_b      | wrapped joined_bytes jump copied_middle decoy truncated lost_packets
m2ts         | h264_open   | whole headless
mpg          | mpeg1@pal mpeg2_open@pal mpeg2_closed@pal | whole headless joined_bytes
vob          | mpeg2_open@pal  | whole headless
flv          | h264_b flv1 | whole cut piped
ogv          | theora      | whole cut
ogv          | theora@vfr theora@ntsc | whole
gif          | gif gif@vfr gif@one | whole
apng         | apng        | whole
wmv          | wmv1 wmv2 msmpeg4 | whole cut piped
nut          | h264_b mpeg4_b | whole cut
mxf          | mpeg2_open@pal  | whole
y4m          | raw         | whole
ivf          | vp8 vp9_hidden av1 | whole
obu          | av1         | whole
h264         | h264_b h264_open h264_b@ntsc | whole headless
hevc         | hevc hevc_open | whole headless
m4v          | mpeg4_b     | whole headless
m2v          | mpeg2_open@pal mpeg2_closed@pal | whole headless
mjpeg        | mjpeg       | whole headless
"""

# A member of every kind, those of different containers first: the suite takes as many, each campaign has all of them.
_MEMBERS = """
mp4/h264_long/cut fragmented/h264_b/cut no_edit_list/h264_b/whole mkv/hevc_open/cut live_webm/vp8/piped avi/mpeg4_b/whole
ts/h264_open/headless mpg/mpeg2_open@pal/headless h264/h264_b/whole gif/gif/whole webm/av1/whole ogv/theora/whole wmv/wmv2/whole
mp4/h264_b/edit_twice mp4/h264_open/cut_between mp4/hevc_open/cut mp4/h264_b@vfr/whole mp4/h264_b/turn90_hflip
mp4/h264_b/vflip mp4/h264_b/sei_hflip mp4/h264/edit_end mp4/h264_b/decoy mp4/h264_b/cover mp4/h264_b/tagged
mkv/h264@crowded/whole avi/xvid_packed/piped ts/h264_b/jump
"""

# What may be refused: nobody can say what the right frames are.
_DOUBTFUL = ("truncated", "turn45", "matrix_slanted", "resized")


@dataclass(frozen=True)
class Cell:
    container: str
    encoding: str
    drawing: str
    edit: str

    def __str__(self) -> str:
        return f"{self.container}/{self.encoding}{'@' if self.drawing else ''}{self.drawing}/{self.edit}"

    @property
    def doubtful(self) -> bool:
        return self.edit in _DOUBTFUL

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{str(self).replace('/', '-')}.{CONTAINERS[self.container][0]}"

    @property
    def whole(self) -> Cell:
        """What it is made from."""
        return Cell(self.container, self.encoding, self.drawing, "whole")

    def words(self) -> list[str]:
        """What draws and encodes it, before anything is done to the file."""
        size, rate, frames, filters = DRAWINGS[self.drawing]
        source = f"nullsrc=s={size}:r={rate},trim=end_frame={frames},{_PICTURE}{filters}"
        encoding = ENCODINGS[self.encoding].split()
        pixels = [] if "-pix_fmt" in encoding else ["-pix_fmt", "yuv420p"]
        as_drawn = ("-fps_mode", "passthrough", "-enc_time_base", "filter")
        return ["-f", "lavfi", "-i", source, *as_drawn, *encoding, *pixels, *CONTAINERS[self.container][1].split()]


def _cells() -> Iterator[Cell]:
    for line in _TABLE.strip().splitlines():
        container, encodings, edits = (part.split() for part in line.split("|"))
        for encoding in encodings:
            kind, _, drawing = encoding.partition("@")
            yield from (Cell(container[0], kind, drawing, edit) for edit in edits)


CELLS = {str(cell): cell for cell in _cells()}
MEMBERS = tuple(_MEMBERS.split())
