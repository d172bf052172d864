"""Fashion nouns by kind: the dictionary behind the weak labels of the tagging task.

Singular forms; plurals follow the rules of English, and the few that do not are listed. A word that as often says how
a thing is made as what it is ("jersey", "lace-up", "stud") is not here.
"""

from __future__ import annotations

from collections.abc import Iterable


class Nouns:
    """A set of names, one to three words long, in singular and plural."""

    def __init__(self, names: Iterable[str]) -> None:
        single = [" ".join(name.split()) for name in names]
        self._names = frozenset(form for name in single for form in (name, pluralize(name)))
        self.longest = max(len(name.split()) for name in self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names


def pluralize(name: str) -> str:
    """Return the regular English plural of a name: "dress" becomes "dresses", "belt bag" becomes "belt bags"."""
    if name.endswith(("s", "x", "z", "ch", "sh")):
        return f"{name}es"
    if name.endswith("y") and name[-2] not in "aeiou":
        return f"{name[:-1]}ies"
    return f"{name}s"


_CLOTHING = """
anorak, ball gown, bikini, blazer, blouse, blouson, board short, bodysuit, bolero, bomber jacket, boxer, bra, bralet,
bralette, breeches, bustier, caftan, camisole, cami, cape, capri, capri pants, cardigan, cargo pants, chino, chinos,
cloak, coat, cocktail dress, corset, crop top, culotte, culottes, denim jacket, denim shorts, dress, dressing gown,
duffle coat, dungaree, dungarees, evening dress, evening gown, frock, gilet, gown, halter top, henley, hoodie, hoody,
jacket, jean, jeans, jegging, jeggings, jogger, joggers, jumper, jumpsuit, kaftan, kilt, kimono, knitwear, leather
jacket, legging, leggings, leotard, lingerie, maxi dress, maxi skirt, midi dress, midi skirt, mini dress, mini skirt,
miniskirt, negligee, nightgown, one-piece, onesie, outerwear, overall, overalls, overcoat, overshirt, palazzo pants,
pant, pants, parka, pea coat, peacoat, pencil skirt, petticoat, pinafore, playsuit, polo, polo shirt, poncho, puffer,
puffer jacket, pullover, pyjama, pyjamas, raincoat, robe, romper, salopette, sari, sarong, shift dress, shirt,
shirtdress, shorts, shrug, singlet, skater dress, skirt, skort, slack, slacks, slip dress, suit, sundress, sweater,
sweatpant, sweatpants, sweatshirt, swimsuit, swimwear, t-shirt, tank, tank top, tankini, tee, tee shirt, t shirt, top,
tracksuit, trench, trench coat, trouser, trousers, tube top, tunic, turtleneck, tuxedo, undershirt, vest, waistcoat,
windbreaker, wrap dress
"""
_SHOES = """
ankle boot, ankle bootie, ballerina, ballerina flat, ballet flat, ballet pump, biker boot, boat shoe, boot, bootie,
brogue, chelsea boot, chukka, clog, combat boot, court shoe, derby, derby shoe, desert boot, driving shoe, espadrille,
flat, flat sandal, flip flop, flip-flop, footwear, gladiator, gladiator sandal, heel, high heel, hiking boot,
huarache, jelly, kitten heel, knee boot, loafer, mary jane, mary-jane, moccasin, monk strap, mule, oxford, oxford
shoe, pump, rain boot, riding boot, running shoe, sandal, shoe, slide, slingback, slipper, sneaker, snow boot,
stiletto, tennis shoe, thong sandal, trainer, walking boot, wedge, wedge sandal, wellington, wellie
"""
_ACCESSORIES = """
anklet, backpack, bag, bag charm, bandana, bangle, barrette, baseball cap, beanie, beaded necklace, belt, beret,
boater, bow tie, bowler, bracelet, briefcase, brooch, bucket bag, bucket hat, cap, card case, card holder, chain bag,
charm bracelet, choker, clutch, clutch bag, cosmetic bag, cross body bag, cross-body bag, crossbody, crossbody bag,
cuff, cuff bracelet, cufflink, drop earring, duffel, duffel bag, ear cuff, earring, eyeglasses, fedora, glasses,
glove, hair clip, hairband, handbag, hat, head wrap, headband, headscarf, hobo, hobo bag, holdall, hoop earring,
jewellery, jewelry, keychain, key ring, locket, luggage, messenger, messenger bag, minaudiere, mitten, neck tie,
necklace, necktie, pendant, pendant necklace, pocket square, pouch, purse, ring, rucksack, satchel, scarf, scarves,
shawl, shopper, shopper bag, shoulder bag, signet ring, snood, statement necklace, stud earring, suitcase, sun hat,
sunglasses, suspender, tiara, tie, tie clip, toiletry bag, tote, tote bag, travel bag, trilby, turban, umbrella,
visor, wallet, watch, weekender, wristlet, wristwatch
"""

FASHION_NOUNS: dict[str, Nouns] = {
    kind: Nouns(names.replace("\n", " ").strip().split(","))
    for kind, names in (("Clo", _CLOTHING), ("Shoe", _SHOES), ("Acc", _ACCESSORIES))
}
"""Entity type -> what its things are called: Clo (clothing), Shoe, Acc (bags, jewellery and other accessories)."""
