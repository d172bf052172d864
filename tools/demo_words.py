"""The vocabulary of the synthetic shop: styles, brands, kinds of product, fabrics, colours, occasions.

Owns words and which style they lean to; draws nothing. Every brand and line is invented.
"""

from __future__ import annotations

from dataclasses import dataclass

STYLES = ("minimal", "boho", "street", "classic", "sporty", "romantic", "workwear")

_CLOTHING_SIZES = ("XS", "S", "M", "L", "XL")
_SHOE_SIZES = ("37", "38", "39", "40", "42", "43")


@dataclass(frozen=True)
class Brand:
    """A maker: its first style is most of what it makes, its second the rest; tier 0 is cheap, 2 is dear."""

    name: str
    styles: tuple[str, str]
    tier: int


@dataclass(frozen=True)
class Kind:
    """A kind of product and where the shop shelves it."""

    slot: str
    noun: str
    group: str
    leaf: str
    genders: tuple[str, ...]
    season: str
    styles: tuple[str, ...]
    sizes: tuple[str, ...]


DEPARTMENTS = {
    "top": "Clothing",
    "bottom": "Clothing",
    "dress": "Clothing",
    "outerwear": "Clothing",
    "shoes": "Shoes",
    "bag": "Accessories",
    "accessory": "Accessories",
}
SLOT_PRICES = {"top": 38, "bottom": 55, "dress": 80, "outerwear": 130, "shoes": 85, "bag": 70, "accessory": 28}

BRANDS = {
    "Clothing": (
        Brand("Norvale", ("minimal", "classic"), 1),
        Brand("Sondrel", ("minimal", "street"), 2),
        Brand("Ilmari Field", ("minimal", "workwear"), 0),
        Brand("Fernmoor", ("boho", "romantic"), 1),
        Brand("Ondaro", ("boho", "street"), 0),
        Brand("Amberlyne", ("boho", "romantic"), 2),
        Brand("Dravik", ("street", "sporty"), 0),
        Brand("Kestrin", ("street", "minimal"), 1),
        Brand("Northgate 88", ("street", "sporty"), 2),
        Brand("Vellacott", ("classic", "romantic"), 2),
        Brand("Brackwell Row", ("classic", "minimal"), 1),
        Brand("Patchley", ("classic", "workwear"), 0),
        Brand("Runmark", ("sporty", "street"), 1),
        Brand("Tarnfield", ("sporty", "minimal"), 0),
        Brand("Volenta", ("sporty", "street"), 2),
        Brand("Maribeau", ("romantic", "boho"), 1),
        Brand("Lunelle Grove", ("romantic", "classic"), 2),
        Brand("Posyline", ("romantic", "boho"), 0),
        Brand("Osk & Pine", ("workwear", "boho"), 1),
        Brand("Carrowick", ("workwear", "classic"), 2),
        Brand("Hartisan", ("workwear", "street"), 0),
    ),
    "Shoes": (
        Brand("Stridell", ("minimal", "sporty"), 1),
        Brand("Tolvane", ("minimal", "classic"), 2),
        Brand("Mirabon", ("boho", "romantic"), 1),
        Brand("Sandkell", ("boho", "minimal"), 0),
        Brand("Kadenza", ("street", "sporty"), 1),
        Brand("Blokwerk", ("street", "workwear"), 0),
        Brand("Pellworth", ("classic", "workwear"), 1),
        Brand("Orrin & Vale", ("classic", "romantic"), 2),
        Brand("Skarsted", ("sporty", "street"), 0),
        Brand("Fleetholm", ("sporty", "minimal"), 1),
        Brand("Pirouelle", ("romantic", "classic"), 1),
        Brand("Rosamere", ("romantic", "boho"), 0),
        Brand("Bruntsoles", ("workwear", "boho"), 1),
        Brand("Ironbeck", ("workwear", "street"), 2),
    ),
    "Accessories": (
        Brand("Lindqvane", ("minimal", "classic"), 1),
        Brand("Ostenby", ("minimal", "street"), 0),
        Brand("Satchmere", ("boho", "workwear"), 1),
        Brand("Wovenna", ("boho", "romantic"), 0),
        Brand("Bexholt", ("street", "sporty"), 0),
        Brand("Kryptone", ("street", "minimal"), 1),
        Brand("Corvella", ("classic", "romantic"), 2),
        Brand("Trovanne", ("classic", "minimal"), 1),
        Brand("Paceloop", ("sporty", "street"), 0),
        Brand("Ravelle", ("sporty", "minimal"), 1),
        Brand("Aurisel", ("romantic", "classic"), 2),
        Brand("Welkin Loop", ("romantic", "boho"), 0),
        Brand("Pockthorn", ("workwear", "street"), 1),
        Brand("Harrow Supply", ("workwear", "classic"), 0),
    ),
}

# Names of product lines: they mean nothing, but each belongs to one style.
LINES = {
    "minimal": ("Arlo", "Plane", "Nuoro", "Sexton", "Halden"),
    "boho": ("Zephira", "Marrow", "Tamsin", "Cadiz", "Willa"),
    "street": ("Riot", "Block", "Kuro", "Vandal", "Metro"),
    "classic": ("Alderney", "Regent", "Camber", "Beaufort", "Wexley"),
    "sporty": ("Pulse", "Vector", "Tempo", "Ridge", "Kinetic"),
    "romantic": ("Odette", "Clemence", "Isolde", "Fleur", "Mirelle"),
    "workwear": ("Foreman", "Smithy", "Dockside", "Granger", "Tack"),
}

_W, _M, _WM = ("Women",), ("Men",), ("Women", "Men")
_SS, _AW, _ANY = "spring-summer", "autumn-winter", "any"


def _kinds(slot: str, *rows: tuple[str, str, str, tuple[str, ...], str, str]) -> tuple[Kind, ...]:
    sizes = {"shoes": _SHOE_SIZES, "bag": (), "accessory": ()}.get(slot, _CLOTHING_SIZES)
    return tuple(
        Kind(slot, noun, group, leaf, genders, season, tuple(styles.split()), sizes)
        for noun, group, leaf, genders, season, styles in rows
    )


KINDS = {
    "top": _kinds(
        "top",
        ("Crew-Neck Tee", "T-Shirts", "Plain T-Shirts", _WM, _ANY, "minimal street sporty"),
        ("Graphic Tee", "T-Shirts", "Graphic T-Shirts", _WM, _ANY, "street"),
        ("Henley", "T-Shirts", "Henleys", _M, _ANY, "workwear boho"),
        ("Button-Down Shirt", "Shirts", "Casual Shirts", _WM, _ANY, "minimal classic workwear"),
        ("Oxford Shirt", "Shirts", "Dress Shirts", _M, _ANY, "classic romantic"),
        ("Overshirt", "Shirts", "Overshirts", _WM, _AW, "workwear street"),
        ("Camp-Collar Shirt", "Shirts", "Casual Shirts", _M, _SS, "boho romantic"),
        ("Peasant Blouse", "Blouses", "Printed Blouses", _W, _SS, "boho"),
        ("Tie-Neck Blouse", "Blouses", "Dress Blouses", _W, _ANY, "classic romantic"),
        ("Puff-Sleeve Blouse", "Blouses", "Dress Blouses", _W, _SS, "romantic"),
        ("Camisole", "Tanks", "Camisoles", _W, _SS, "minimal romantic"),
        ("Tank", "Tanks", "Athletic Tanks", _WM, _SS, "sporty"),
        ("Polo", "Shirts", "Polos", _WM, _SS, "classic sporty"),
        ("Half-Zip Pullover", "Activewear", "Training Tops", _WM, _AW, "sporty"),
        ("Hoodie", "Sweatshirts", "Hoodies", _WM, _ANY, "street sporty"),
        ("Cardigan", "Knitwear", "Cardigans", _WM, _AW, "classic romantic boho"),
        ("Turtleneck Sweater", "Knitwear", "Turtlenecks", _WM, _AW, "minimal classic"),
        ("Cable-Knit Jumper", "Knitwear", "Jumpers", _WM, _AW, "classic workwear"),
    ),
    "bottom": _kinds(
        "bottom",
        ("Straight-Leg Jeans", "Jeans", "Straight Jeans", _WM, _ANY, "minimal workwear"),
        ("Baggy Jeans", "Jeans", "Loose Jeans", _WM, _ANY, "street"),
        ("Chinos", "Trousers", "Chinos", _WM, _ANY, "classic minimal"),
        ("Pleated Trousers", "Trousers", "Dress Trousers", _WM, _ANY, "classic minimal"),
        ("Cargo Pants", "Trousers", "Cargo Trousers", _WM, _ANY, "street workwear"),
        ("Carpenter Pants", "Trousers", "Work Trousers", _WM, _ANY, "workwear"),
        ("Wide-Leg Pants", "Trousers", "Wide Trousers", _W, _ANY, "minimal boho"),
        ("Drawstring Pants", "Trousers", "Casual Trousers", _M, _SS, "boho romantic"),
        ("Joggers", "Activewear", "Joggers", _WM, _ANY, "sporty street"),
        ("Leggings", "Activewear", "Leggings", _W, _ANY, "sporty"),
        ("Running Shorts", "Activewear", "Shorts", _WM, _SS, "sporty"),
        ("Bermuda Shorts", "Shorts", "Casual Shorts", _WM, _SS, "classic workwear"),
        ("Midi Skirt", "Skirts", "Midi Skirts", _W, _ANY, "romantic classic"),
        ("Tiered Maxi Skirt", "Skirts", "Maxi Skirts", _W, _SS, "boho"),
        ("Mini Skirt", "Skirts", "Mini Skirts", _W, _ANY, "street romantic"),
        ("Corduroys", "Trousers", "Casual Trousers", _WM, _AW, "boho workwear romantic"),
    ),
    "dress": _kinds(
        "dress",
        ("Wrap Midi Dress", "Dresses", "Midi Dresses", _W, _ANY, "classic romantic"),
        ("Slip Dress", "Dresses", "Midi Dresses", _W, _SS, "minimal romantic"),
        ("Shirt Dress", "Dresses", "Shirt Dresses", _W, _ANY, "classic workwear"),
        ("Maxi Dress", "Dresses", "Maxi Dresses", _W, _SS, "boho"),
        ("Tea Dress", "Dresses", "Midi Dresses", _W, _SS, "romantic"),
        ("T-Shirt Dress", "Dresses", "Mini Dresses", _W, _SS, "street sporty"),
        ("Column Dress", "Dresses", "Maxi Dresses", _W, _ANY, "minimal"),
        ("Sweater Dress", "Dresses", "Knit Dresses", _W, _AW, "minimal classic boho"),
        ("Pinafore Dress", "Dresses", "Mini Dresses", _W, _AW, "workwear street"),
        ("Tennis Dress", "Dresses", "Sport Dresses", _W, _SS, "sporty"),
        ("Hooded Sweat Dress", "Dresses", "Knit Dresses", _W, _AW, "sporty street"),
    ),
    "outerwear": _kinds(
        "outerwear",
        ("Trench Coat", "Coats", "Trench Coats", _WM, _ANY, "classic minimal"),
        ("Overcoat", "Coats", "Wool Coats", _WM, _AW, "classic minimal romantic"),
        ("Puffer Jacket", "Jackets", "Puffer Jackets", _WM, _AW, "street sporty"),
        ("Bomber Jacket", "Jackets", "Bomber Jackets", _WM, _ANY, "street"),
        ("Windbreaker", "Jackets", "Rain Jackets", _WM, _SS, "sporty street"),
        ("Shell Jacket", "Jackets", "Rain Jackets", _WM, _ANY, "sporty"),
        ("Chore Jacket", "Jackets", "Work Jackets", _WM, _ANY, "workwear"),
        ("Barn Coat", "Coats", "Casual Coats", _WM, _AW, "workwear boho"),
        ("Blazer", "Blazers", "Single-Breasted Blazers", _WM, _ANY, "classic minimal"),
        ("Kimono Jacket", "Jackets", "Light Jackets", _W, _SS, "boho romantic"),
        ("Cropped Bolero", "Jackets", "Light Jackets", _W, _SS, "romantic"),
        ("Poncho", "Coats", "Capes", _WM, _AW, "boho"),
    ),
    "shoes": _kinds(
        "shoes",
        ("Low-Top Sneakers", "Sneakers", "Casual Sneakers", _WM, _ANY, "minimal street"),
        ("High-Top Sneakers", "Sneakers", "High-Tops", _WM, _ANY, "street"),
        ("Running Shoes", "Sneakers", "Running Shoes", _WM, _ANY, "sporty"),
        ("Trail Runners", "Sneakers", "Trail Shoes", _WM, _ANY, "sporty"),
        ("Loafers", "Flats", "Loafers", _WM, _ANY, "classic minimal"),
        ("Derby Shoes", "Flats", "Lace-Ups", _WM, _ANY, "classic minimal"),
        ("Ballet Flats", "Flats", "Ballerinas", _W, _SS, "romantic classic"),
        ("Slingbacks", "Heels", "Kitten Heels", _W, _ANY, "romantic classic"),
        ("Mary Janes", "Heels", "Block Heels", _W, _ANY, "romantic"),
        ("Espadrilles", "Sandals", "Espadrilles", _WM, _SS, "boho romantic"),
        ("Strappy Sandals", "Sandals", "Flat Sandals", _W, _SS, "boho minimal"),
        ("Clogs", "Flats", "Clogs", _WM, _ANY, "boho workwear"),
        ("Work Boots", "Boots", "Lace-Up Boots", _WM, _AW, "workwear"),
        ("Chelsea Boots", "Boots", "Chelsea Boots", _WM, _AW, "minimal classic"),
        ("Desert Boots", "Boots", "Ankle Boots", _WM, _ANY, "boho workwear romantic"),
        ("Platform Boots", "Boots", "Platform Boots", _W, _AW, "street romantic"),
        ("Pool Slides", "Sandals", "Slides", _WM, _SS, "sporty street"),
    ),
    "bag": _kinds(
        "bag",
        ("Tote", "Bags", "Tote Bags", _WM, _ANY, "minimal classic"),
        ("Crossbody Bag", "Bags", "Crossbody Bags", _WM, _ANY, "minimal street"),
        ("Belt Bag", "Bags", "Belt Bags", _WM, _ANY, "street sporty"),
        ("Gym Duffel", "Bags", "Sport Bags", _WM, _ANY, "sporty"),
        ("Backpack", "Bags", "Backpacks", _WM, _ANY, "street sporty workwear"),
        ("Satchel", "Bags", "Satchels", _WM, _ANY, "classic workwear"),
        ("Hobo Bag", "Bags", "Shoulder Bags", _W, _ANY, "boho"),
        ("Basket Bag", "Bags", "Basket Bags", _W, _SS, "boho romantic"),
        ("Clutch", "Bags", "Clutches", _W, _ANY, "romantic classic"),
        ("Tool Tote", "Bags", "Tote Bags", _WM, _ANY, "workwear"),
        ("Messenger Bag", "Bags", "Messenger Bags", _M, _ANY, "boho classic romantic"),
    ),
    "accessory": _kinds(
        "accessory",
        ("Bar Pendant Necklace", "Jewellery", "Necklaces", _W, _ANY, "minimal"),
        ("Pearl Drop Earrings", "Jewellery", "Earrings", _W, _ANY, "romantic classic"),
        ("Hoop Earrings", "Jewellery", "Earrings", _W, _ANY, "street boho"),
        ("Beaded Bracelet", "Jewellery", "Bracelets", _WM, _ANY, "boho"),
        ("Signet Ring", "Jewellery", "Rings", _WM, _ANY, "street classic"),
        ("Field Watch", "Watches", "Analogue Watches", _WM, _ANY, "workwear minimal"),
        ("Fitness Watch", "Watches", "Digital Watches", _WM, _ANY, "sporty"),
        ("Baseball Cap", "Hats", "Caps", _WM, _ANY, "street sporty"),
        ("Bucket Hat", "Hats", "Bucket Hats", _WM, _SS, "street boho"),
        ("Beanie", "Hats", "Beanies", _WM, _AW, "workwear street sporty"),
        ("Wide-Brim Hat", "Hats", "Sun Hats", _WM, _SS, "boho romantic"),
        ("Neck Scarf", "Scarves", "Neckerchiefs", _WM, _ANY, "romantic classic"),
        ("Leather Belt", "Belts", "Casual Belts", _WM, _ANY, "workwear classic minimal"),
        ("Aviator Sunglasses", "Sunglasses", "Aviators", _WM, _SS, "classic street minimal"),
    ),
}

# Per department and style: what warm days take, what cold days take.
FABRICS: dict[str, dict[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "Clothing": {
        "minimal": (("Poplin", "Lyocell", "Linen-Blend"), ("Merino", "Double-Faced Wool", "Ponte")),
        "boho": (("Cotton Gauze", "Linen-Blend", "Crochet"), ("Suede", "Brushed Cotton", "Mohair")),
        "street": (("Jersey", "Mesh", "Nylon"), ("Heavyweight Fleece", "Nylon", "Bonded Jersey")),
        "classic": (("Poplin", "Seersucker", "Pique"), ("Tweed", "Merino", "Flannel")),
        "sporty": (("Quick-Dry Knit", "Mesh", "Stretch Nylon"), ("Thermal Knit", "Polar Fleece", "Softshell")),
        "romantic": (("Chiffon", "Broderie Cotton", "Satin"), ("Velvet", "Brushed Crepe", "Mohair")),
        "workwear": (("Chambray", "Ripstop", "Hemp Cotton"), ("Duck Canvas", "Moleskin", "Flannel")),
    },
    "Shoes": {
        "minimal": (("Smooth Leather", "Canvas"), ("Smooth Leather", "Nubuck")),
        "boho": (("Raffia", "Woven Leather"), ("Suede", "Shearling")),
        "street": (("Canvas", "Knit Mesh"), ("Patent", "Rubberised Leather")),
        "classic": (("Calfskin", "Nappa"), ("Calfskin", "Burnished Leather")),
        "sporty": (("Engineered Mesh", "Foam"), ("Waterproof Mesh", "Foam")),
        "romantic": (("Satin", "Nappa"), ("Velvet", "Patent")),
        "workwear": (("Waxed Canvas", "Oiled Leather"), ("Oiled Leather", "Roughout Leather")),
    },
    "Accessories": {
        "minimal": (("Matte Steel", "Smooth Leather"), ("Brushed Silver", "Smooth Leather")),
        "boho": (("Straw", "Turquoise-Set"), ("Suede", "Hammered Brass")),
        "street": (("Nylon", "Chunky Steel"), ("Coated Canvas", "Chunky Steel")),
        "classic": (("Nappa", "Gold-Tone"), ("Saffiano Leather", "Silk Twill")),
        "sporty": (("Recycled Nylon", "Silicone"), ("Water-Repellent Nylon", "Silicone")),
        "romantic": (("Satin", "Rose Gold"), ("Velvet", "Freshwater Pearl")),
        "workwear": (("Waxed Canvas", "Brass"), ("Bridle Leather", "Brass")),
    },
}

CUTS: dict[str, dict[str, tuple[str, ...]]] = {
    "Clothing": {
        "minimal": ("Clean-Line", "Boxy", "Seamless"),
        "boho": ("Fringed", "Embroidered", "Flowing"),
        "street": ("Oversized", "Drop-Shoulder", "Paneled"),
        "classic": ("Tailored", "Double-Stitched", "Regular-Fit"),
        "sporty": ("Performance", "Reflective", "Compression"),
        "romantic": ("Ruffled", "Lace-Trim", "Bow-Front"),
        "workwear": ("Utility", "Triple-Stitch", "Patch-Pocket"),
    },
    "Shoes": {
        "minimal": ("Unlined", "Tonal"),
        "boho": ("Hand-Woven", "Tasselled"),
        "street": ("Chunky", "Platform-Sole"),
        "classic": ("Welted", "Almond-Toe"),
        "sporty": ("Cushioned", "Lightweight"),
        "romantic": ("Ankle-Strap", "Bow-Detail"),
        "workwear": ("Lug-Sole", "Steel-Shank"),
    },
    "Accessories": {
        "minimal": ("Slim", "Unbranded"),
        "boho": ("Hand-Beaded", "Braided"),
        "street": ("Logo", "Chain-Link"),
        "classic": ("Structured", "Monogram"),
        "sporty": ("Sweatproof", "Packable"),
        "romantic": ("Delicate", "Scalloped"),
        "workwear": ("Riveted", "Heavy-Duty"),
    },
}

COLOURS = {
    "neutral": ("Black", "White", "Ivory", "Stone", "Charcoal", "Navy"),
    "earth": ("Rust", "Olive", "Ochre", "Terracotta", "Sand", "Chestnut"),
    "pastel": ("Sage", "Blush", "Lilac", "Powder Blue", "Butter", "Mint"),
    "vivid": ("Cobalt", "Fuchsia", "Scarlet", "Tangerine", "Lime", "Turquoise"),
    "deep": ("Burgundy", "Forest Green", "Plum", "Ink", "Teal", "Aubergine"),
}
# Per style: palettes, and how often it takes each.
PALETTES: dict[str, tuple[tuple[str, ...], tuple[float, ...]]] = {
    "minimal": (("pastel", "deep"), (2.0, 1.0)),
    "boho": (("earth", "deep"), (3.0, 1.0)),
    "street": (("vivid", "earth"), (3.0, 1.0)),
    "classic": (("deep", "pastel"), (3.0, 1.0)),
    "sporty": (("vivid", "pastel"), (3.0, 1.0)),
    "romantic": (("pastel", "deep"), (3.0, 1.0)),
    "workwear": (("earth", "deep"), (2.0, 1.0)),
}

CARE = (
    "Machine wash at 30 degrees.",
    "Wipe clean with a damp cloth.",
    "Dry clean only.",
    "Made to last and easy to mend.",
    "Ships in recycled paper.",
)

# Per style: where one goes on warm days, and on cold ones.
OCCASIONS = {
    "minimal": (("a gallery afternoon", "a warm day at the studio"), ("a weekday in town", "a winter opening")),
    "boho": (("a beach weekend", "a festival day"), ("a cabin weekend", "a night by the fire")),
    "street": (("a skate park afternoon", "a rooftop party"), ("a city night out", "a record fair")),
    "classic": (("a garden lunch", "a summer office week"), ("a client meeting", "a Sunday roast")),
    "sporty": (("a morning run", "a tennis match"), ("a training camp", "a frosty trail")),
    "romantic": (("a summer wedding", "a picnic for two"), ("a candlelit dinner", "an evening at the ballet")),
    "workwear": (("a day in the workshop", "a farmers' market"), ("a week on site", "a walk in the woods")),
}
