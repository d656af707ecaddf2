"""Small clips of every kind, made with ffmpeg, and the judgement whether a reader shows what ffmpeg shows."""
