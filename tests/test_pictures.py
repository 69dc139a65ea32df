"A picture is what a viewer shows, wherever it comes from."
from io import BytesIO

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from spatialid.scenes import Objects, background
from spatialid.videos import read_video, write_video
from spatialid.hooks import VLM
from spatialid.query import Query
from spatialid.mirror_swap import recolour
from spatialid.pictures import as_seen, eight_bits
from spatialid.plots import show_pictures
from tiny import tiny_llava

WHITE, RED, BLUE = (255, 255, 255), (255, 0, 0), (0, 0, 255)


def reopened(image, form, **options):
    "The picture as a file has it."
    file = BytesIO()
    image.save(file, form, **options)
    file.seek(0)
    return Image.open(file)


def rotated():
    "Red left, blue right, stored lying on its side with a note to turn it."
    seen = Image.new("RGB", (40, 20), RED)
    seen.paste(BLUE, (20, 0, 40, 20))
    exif = Image.Exif()
    exif[274] = 6  # turn by 90° clockwise to see it
    return reopened(seen.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)


def test_a_photograph_is_turned_as_its_exif_data_say():
    "Without it left and right change places with above and below."
    lying, seen = rotated(), as_seen(rotated())
    assert lying.size == (20, 40) and seen.size == (40, 20)
    assert seen.getpixel((5, 10)) == RED and seen.getpixel((35, 10)) == BLUE


@pytest.mark.parametrize("value", [0, 255, 256, 40_000, 65_535])
def test_sixteen_bits_are_scaled(value):
    "All above 255 was white before."
    image = reopened(Image.fromarray(np.full((2, 2), value, np.uint16)), "PNG")
    assert image.mode.startswith("I;16") and as_seen(image).getpixel((1, 1)) == (round(value / 257),) * 3


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_a_range_are_refused(mode):
    with pytest.raises(ValueError, match=f"mode '{mode}' has 32-bit pixels .* convert it to 'L'"):
        as_seen(Image.new(mode, (2, 2)))


def test_what_is_transparent_is_white():
    "In every mode that can be transparent, half transparency included."
    palette = Image.new("P", (2, 2))
    palette.putpalette([*RED, *BLUE])
    hidden = {
        "RGBA": Image.new("RGBA", (2, 2), (*RED, 0)),
        "LA": Image.new("LA", (2, 2), (0, 0)),
        "palette": reopened(palette, "PNG", transparency=0),
        "PA": Image.new("RGBA", (2, 2), (*RED, 0)).convert("PA"),
        "RGB with a transparent colour": reopened(Image.new("RGB", (2, 2), RED), "PNG", transparency=RED),
    }
    assert {name: as_seen(image).getpixel((0, 0)) for name, image in hidden.items()} == dict.fromkeys(hidden, WHITE)
    assert as_seen(Image.new("RGBA", (2, 2), (*RED, 128))).getpixel((0, 0)) == (255, 127, 127)
    assert as_seen(palette).getpixel((0, 0)) == RED, "a palette without transparency stays as it is"


def test_an_ordinary_picture_is_not_touched():
    image = Image.effect_noise((16, 16), 50).convert("RGB")
    assert as_seen(image).tobytes() == image.tobytes() and eight_bits(image.convert("L")).mode == "L"


def test_folders_of_pictures_show_what_a_viewer_shows(tmp_path):
    "Backgrounds, renders and frames; files that the system hides beside them are none."
    (tmp_path / "photos").mkdir()
    rotated().save(tmp_path / "photos" / "a.png", exif=rotated().info["exif"])
    (tmp_path / "photos" / "._a.png").write_bytes(b"not a picture")
    canvas = background(str(tmp_path / "photos"), 20, np.random.default_rng(0))
    assert tuple(canvas[10, 2]) == RED and tuple(canvas[10, 17]) == BLUE
    (tmp_path / "renders").mkdir()
    Image.new("RGBA", (8, 8), (*RED, 255)).save(tmp_path / "renders" / "cup.png")
    (tmp_path / "renders" / "._cup.png").write_bytes(b"not a picture")
    assert list(Objects(tmp_path / "renders").names) == ["cup"]
    frames = [Image.new("RGBA", (16, 16), (*RED, 0))] * 2
    shown, *_ = read_video(write_video(tmp_path / "v.mp4", frames))
    assert shown[0].getpixel((8, 8))[1] > 250


def test_recolouring_does_not_show_a_hidden_colour():
    hidden = Image.new("RGBA", (4, 4), (*RED, 0))
    assert recolour(hidden, np.random.default_rng(0)).getpixel((0, 0)) == WHITE


def test_a_model_is_given_what_a_viewer_shows():
    "A lying photograph gives the logits of the one that stands."
    seen = Image.new("RGB", (32, 16), RED)
    seen.paste(BLUE, (16, 0, 32, 16))
    exif = Image.Exif()
    exif[274] = 6
    lying = reopened(seen.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)
    vlm = VLM(*tiny_llava())
    logits = lambda image: vlm.run(Query(image, "Is it red?", {}, ("yes", "no"))).logits
    assert (logits(lying) == logits(seen)).all()


def test_pictures_are_shown_side_by_side_with_their_titles():
    pictures = {"red": Image.new("RGB", (4, 4), RED), "blue": np.full((4, 4, 3), BLUE, np.uint8)}
    fig, axes = show_pictures(pictures.values(), pictures.keys(), "two", size=(3, 1))
    assert [ax.get_title() for ax in axes] == ["red", "blue"] and tuple(fig.get_size_inches()) == (3, 1)
    for ax, colour in zip(axes, (RED, BLUE)): assert (np.asarray(ax.images[0].get_array()) == colour).all()
    plt.close(fig)
    with pytest.raises(ValueError): show_pictures(pictures.values(), ["one title for two"])
    plt.close("all")
