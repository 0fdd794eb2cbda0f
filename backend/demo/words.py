"""What the question families are made of: words, facts and names."""

from __future__ import annotations

import string

LETTERS = tuple(string.ascii_lowercase)

NAMES = tuple(
    "Tom Ann Joe Mia Sam Eva Ben Zoe Max Ida Leo Amy Jim Kim Dan Sue Bob Lea Tim Nora Paul Rosa Hugo Emma Carl Lucy Otto Jane "
    "Fred Vera Mark Nina Ivan Olga John Mary".split()
)

PLACES = tuple(
    "garden kitchen office school park shop museum station library hotel forest tower market church bank harbor".split()
)

THINGS = tuple("apples books coins pens cups stones cards eggs keys balls shells nuts".split())

CAPITALS = dict(
    pair.split(":")
    for pair in (
        "France:Paris Germany:Berlin Italy:Rome Spain:Madrid Portugal:Lisbon Austria:Vienna Greece:Athens Norway:Oslo "
        "Sweden:Stockholm Finland:Helsinki Denmark:Copenhagen Poland:Warsaw Hungary:Budapest Ireland:Dublin England:London "
        "Belgium:Brussels Russia:Moscow Ukraine:Kiev Turkey:Ankara Egypt:Cairo Kenya:Nairobi Japan:Tokyo China:Beijing "
        "Korea:Seoul Thailand:Bangkok Vietnam:Hanoi Iran:Tehran Iraq:Baghdad Canada:Ottawa Cuba:Havana Peru:Lima "
        "Chile:Santiago Australia:Canberra Romania:Bucharest Bulgaria:Sofia Serbia:Belgrade"
    ).split()
)

OPPOSITES = dict(
    pair.split(":")
    for pair in (
        "hot:cold big:small fast:slow old:new high:low long:short hard:soft rich:poor full:empty light:dark wet:dry "
        "open:closed early:late strong:weak happy:sad left:right up:down day:night good:bad near:far clean:dirty "
        "young:aged thick:thin deep:shallow loud:quiet wide:narrow sweet:sour war:peace true:false first:last buy:sell"
    ).split()
)

PLURALS = dict(
    pair.split(":")
    for pair in (
        "cat:cats dog:dogs house:houses tree:trees book:books bird:birds child:children man:men woman:women foot:feet "
        "tooth:teeth mouse:mice city:cities baby:babies box:boxes fox:foxes leaf:leaves wolf:wolves knife:knives "
        "sheep:sheep fish:fish key:keys car:cars boat:boats star:stars hand:hands lady:ladies bus:buses wife:wives "
        "king:kings story:stories church:churches"
    ).split()
)

FRENCH = dict(
    pair.split(":")
    for pair in (
        "cat:chat dog:chien house:maison tree:arbre book:livre bird:oiseau water:eau bread:pain milk:lait sun:soleil "
        "moon:lune sea:mer red:rouge green:vert blue:bleu black:noir white:blanc one:un two:deux three:trois four:quatre "
        "five:cinq king:roi queen:reine man:homme woman:femme child:enfant day:jour night:nuit hand:main head:tête "
        "heart:cœur door:porte street:rue city:ville friend:ami"
    ).split()
)

DIGIT_WORDS = tuple("zero one two three four five six seven eight nine".split())

CALENDAR = (
    tuple("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()),
    tuple("January February March April May June July August September October November December".split()),
)

CATEGORIES = {
    name: tuple(members.split())
    for name, members in {
        "animal": "cat dog horse cow pig wolf bear lion tiger mouse sheep goat",
        "fruit": "apple pear plum lemon cherry peach melon grape banana orange",
        "tool": "hammer saw knife spade rake drill axe needle brush shovel",
        "country": "France Italy Spain Japan China Egypt Canada Poland Norway Greece",
        "drink": "water milk tea coffee juice wine beer cocoa",
        "metal": "iron gold silver copper lead tin zinc steel",
        "vehicle": "car bus train boat ship plane truck bicycle",
        "body part": "hand foot head arm leg nose ear eye knee neck",
        "month": "January March April June July August October December",
        "job": "doctor teacher farmer baker driver nurse lawyer painter sailor judge",
    }.items()
}

#: Words whose first letter is asked for.
INITIAL_WORDS = tuple(
    "apple big car day east fish gold house iron just king long moon night open park queen red sun tree under very water "
    "young zoo bird cold dark egg fire green hand idea joy key lion milk north old paper quiet road ship time up voice wind "
    "yes zero air black city door earth face good heart ink jump kind light man name oil part quick river stone table use view"
    " white year zone".split()
)

#: unit, smaller unit, power of ten
UNITS = (("km", "m", 3), ("m", "cm", 2), ("cm", "mm", 1), ("kg", "g", 3), ("l", "ml", 3), ("dollars", "cents", 2))

GERMAN = dict(
    pair.split(":")
    for pair in (
        "cat:Katze dog:Hund house:Haus tree:Baum book:Buch bird:Vogel water:Wasser bread:Brot milk:Milch sun:Sonne moon:Mond "
        "sea:Meer red:rot green:grün blue:blau black:schwarz white:weiß one:eins two:zwei three:drei four:vier five:fünf "
        "king:König woman:Frau man:Mann child:Kind day:Tag night:Nacht hand:Hand head:Kopf heart:Herz door:Tür "
        "street:Straße city:Stadt friend:Freund table:Tisch stone:Stein apple:Apfel fire:Feuer ice:Eis"
    ).split()
)

PAST = dict(
    pair.split(":")
    for pair in (
        "go:went see:saw take:took give:gave come:came find:found think:thought tell:told know:knew get:got make:made "
        "say:said eat:ate drink:drank run:ran sing:sang write:wrote read:read speak:spoke break:broke buy:bought "
        "bring:brought catch:caught teach:taught build:built send:sent lose:lost win:won sell:sold feel:felt keep:kept "
        "leave:left meet:met pay:paid ride:rode rise:rose sit:sat sleep:slept stand:stood swim:swam throw:threw wake:woke"
    ).split()
)

SYMBOLS = dict(
    pair.split(":")
    for pair in (
        "hydrogen:H helium:He carbon:C nitrogen:N oxygen:O neon:Ne sodium:Na magnesium:Mg silicon:Si phosphorus:P sulfur:S "
        "chlorine:Cl argon:Ar potassium:K calcium:Ca iron:Fe cobalt:Co nickel:Ni copper:Cu zinc:Zn silver:Ag tin:Sn iodine:I "
        "gold:Au mercury:Hg lead:Pb radium:Ra uranium:U platinum:Pt tungsten:W titanium:Ti manganese:Mn"
    ).split()
)
