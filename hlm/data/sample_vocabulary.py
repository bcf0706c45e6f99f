"""The words of the sample catalogue: what shops call things, and what people type.

Every attribute value and every category has words that ads use and words that queries use. They overlap only in part:
trade names of colours, abbreviations and other units are what a teacher has to learn. Brands are invented.
"""

from __future__ import annotations

# axis -> value (its plain name) -> (forms in ads, forms in queries)
AXES: dict[str, dict[str, tuple[list[str], list[str]]]] = {
    "colour": {
        "black": (["Midnight", "Onyx", "Raven finish", "black"], ["black", "blk", "dark"]),
        "white": (["Polar", "Alabaster", "Snowdrop finish", "white"], ["white", "wht"]),
        "red": (["Crimson", "Ember", "Rosso", "red"], ["red"]),
        "blue": (["Cobalt", "Lagoon", "Indigo", "blue"], ["blue", "navy", "nvy"]),
        "green": (["Fern", "Juniper", "Moss", "green"], ["green", "grn"]),
        "silver": (["Mercury", "Glacier", "Brushed Moon", "silver"], ["silver", "grey", "gray"]),
    },
    "material": {
        "stainless steel": (["inox 18/10", "stainless steel", "brushed inox"], ["stainless steel", "ss", "steel"]),
        "wood": (["solid oak", "acacia", "beech timber"], ["wood", "wooden"]),
        "plastic": (["BPA-free polymer", "ABS shell", "Tritan"], ["plastic"]),
        "glass": (["borosilicate", "tempered glass", "Duran"], ["glass"]),
        "ceramic": (["stoneware", "porcelain", "ceramic"], ["ceramic", "china"]),
        "cast iron": (["enamelled iron", "cast iron", "seasoned ferro"], ["cast iron", "iron"]),
    },
    "capacity": {
        "0.5 l": (["500 ml", "0.5 L"], ["half litre", "500ml", "0.5l", "16 oz"]),
        "1 l": (["1000 ml", "1.0 L"], ["1 litre", "1l", "one liter"]),
        "1.5 l": (["1500 ml", "1.5 L"], ["1.5 litre", "1.5l"]),
        "2 l": (["2000 ml", "2.0 L"], ["2 litre", "2l", "half gallon"]),
        "5 l": (["5000 ml", "5.0 L"], ["5 litre", "5l", "large family"]),
    },
    "power": {
        "corded": (["mains operated 230 V", "wired supply"], ["corded", "plug in", "mains"]),
        "cordless": (["18V Li-ion", "accu driven"], ["cordless", "battery"]),
        "usb": (["Type-C charging", "5V DC input"], ["usb", "rechargeable"]),
        "manual": (["hand operated", "no power needed"], ["manual", "hand"]),
        "petrol": (["2-stroke engine", "combustion drive"], ["petrol", "gas powered"]),
    },
    "duty": {
        "professional": (["trade grade", "contractor series"], ["professional", "pro", "heavy duty"]),
        "home": (["household line", "DIY class"], ["home", "diy"]),
        "compact": (["space-saving", "short body"], ["compact", "mini", "small"]),
        "quiet": (["low-noise 48 dB", "whisper drive"], ["quiet", "silent"]),
    },
    "size": {
        "small": (["EU 36-38", "size S"], ["small", "s", "sml"]),
        "medium": (["EU 40-42", "size M"], ["medium", "m", "med"]),
        "large": (["EU 44-46", "size L"], ["large", "l", "lrg"]),
        "extra large": (["EU 48-50", "size XL"], ["xl", "extra large", "x large"]),
        "plus": (["EU 52-56", "size XXL"], ["xxl", "plus size", "big"]),
    },
    "audience": {
        "women": (["ladies' cut", "femme"], ["womens", "women", "for her"]),
        "men": (["gents' cut", "homme"], ["mens", "men", "for him"]),
        "kids": (["junior", "youth fit"], ["kids", "childrens", "child"]),
    },
    "fabric": {
        "cotton": (["combed cotton", "jersey"], ["cotton"]),
        "wool": (["merino", "lambswool"], ["wool", "woolen"]),
        "leather": (["full-grain hide", "nappa"], ["leather"]),
        "recycled": (["rPET", "upcycled polyester"], ["recycled", "eco"]),
        "linen": (["flax weave", "pure linen"], ["linen"]),
    },
    "weather": {
        "waterproof": (["IPX7", "sealed seams", "20,000 mm column"], ["waterproof", "rain", "wet weather"]),
        "insulated": (["thermal lining", "PrimaFill 200"], ["warm", "winter", "insulated"]),
        "breathable": (["mesh panels", "AirDry"], ["breathable", "summer", "light"]),
        "windproof": (["StormShell", "gale-tested"], ["windproof", "wind"]),
    },
    "screen": {
        "13 inch": (["33 cm display", '13.3"'], ["13 inch", "13in"]),
        "15 inch": (["39.6 cm display", '15.6"'], ["15 inch", "15in"]),
        "24 inch": (["61 cm panel", '24"'], ["24 inch", "24in"]),
        "32 inch": (["81 cm panel", '32"'], ["32 inch", "32in"]),
        "55 inch": (["140 cm panel", '55"'], ["55 inch", "55in", "big screen"]),
    },
    "storage": {
        "128 gb": (["128GB flash", "0.125 TB"], ["128gb", "128 gb"]),
        "256 gb": (["256GB flash", "0.25 TB"], ["256gb", "256 gig"]),
        "512 gb": (["512GB flash", "half-terabyte"], ["512gb", "512 gb"]),
        "1 tb": (["1000GB flash", "1024 GB"], ["1tb", "1 terabyte"]),
    },
    "link": {
        "bluetooth": (["BT 5.3", "wireless A2DP"], ["bluetooth", "wireless"]),
        "wifi": (["802.11ax", "WLAN"], ["wifi", "wi-fi"]),
        "wired": (["RJ45 LAN", "3.5 mm lead"], ["wired", "cable", "ethernet"]),
        "hdmi": (["HDMI 2.1", "4K video port"], ["hdmi", "tv connection"]),
    },
    "people": {
        "1 person": (["solo", "single berth"], ["1 person", "one man", "single"]),
        "2 person": (["duo", "twin berth"], ["2 person", "two man", "for two", "couples"]),
        "4 person": (["quad berth", "sleeps four"], ["4 person", "family"]),
        "group": (["basecamp class", "sleeps eight"], ["group", "large party"]),
    },
    "weight": {
        "ultralight": (["0.9 kg", "featherweight"], ["ultralight", "lightweight", "backpacking"]),
        "2 kg": (["2000 g", "2.0 kg"], ["2kg", "4 lb"]),
        "5 kg": (["5000 g", "5.0 kg"], ["5kg", "11 lb"]),
        "10 kg": (["10,000 g", "10.0 kg"], ["10kg", "22 lb"]),
    },
    "pack": {
        "single": (["1 pc", "sold individually"], ["single", "one"]),
        "3 pack": (["trio", "3 pcs"], ["3 pack", "pack of 3", "three"]),
        "6 pack": (["half-dozen", "6 pcs"], ["6 pack", "pack of 6", "six"]),
        "12 pack": (["dozen", "12 pcs"], ["12 pack", "box of 12", "bulk"]),
    },
    "scent": {
        "lavender": (["Provence bloom", "lavandula"], ["lavender"]),
        "citrus": (["Amalfi zest", "bergamot"], ["citrus", "lemon", "orange"]),
        "vanilla": (["Bourbon pod", "sweet cream"], ["vanilla"]),
        "unscented": (["fragrance-free", "neutral 0%"], ["unscented", "no perfume"]),
        "mint": (["menthol", "cool peppermint"], ["mint", "minty"]),
    },
    "skin": {
        "dry": (["rich hydration", "24h moisture"], ["dry skin", "dry"]),
        "oily": (["mattifying", "sebum control"], ["oily skin", "oily"]),
        "sensitive": (["dermatologist tested", "hypoallergenic"], ["sensitive skin", "sensitive", "gentle"]),
        "mature": (["Q10 firming", "anti-wrinkle"], ["anti ageing", "mature skin"]),
    },
    "age": {
        "newborn": (["0-3 months", "from birth"], ["newborn", "new baby"]),
        "toddler": (["1-3 years", "first steps"], ["toddler", "2 year old"]),
        "preschool": (["3-5 years", "kindergarten"], ["preschool", "4 year old"]),
        "school": (["6-9 years", "classroom age"], ["school age", "7 year old"]),
    },
    "diet": {
        "vegan": (["plant-based", "no animal products"], ["vegan"]),
        "gluten free": (["coeliac safe", "wheat-free"], ["gluten free", "gf"]),
        "sugar free": (["no added sucrose", "stevia sweetened"], ["sugar free", "diabetic", "low sugar"]),
        "organic": (["bio certified", "pesticide-free farming"], ["organic", "bio"]),
        "high protein": (["20 g protein", "muscle fuel"], ["protein", "high protein"]),
    },
    "breed": {
        "puppy": (["up to 12 months", "young animals"], ["puppy", "kitten", "young"]),
        "small": (["toy breeds", "under 10 kilos"], ["small breed", "small"]),
        "large": (["giant breeds", "over 25 kilos"], ["large breed", "big"]),
        "senior": (["7+ years", "ageing animals"], ["senior", "old"]),
    },
}

# department -> (its three axes, its brands, categories: (name in ads, names in queries))
DEPARTMENTS: dict[str, tuple[list[str], list[str], list[tuple[str, list[str]]]]] = {
    "kitchen": (
        ["colour", "material", "capacity"],
        ["Halden", "Brixia", "Ovano", "Culinex", "Torrel", "Maresk"],
        [("water kettle", ["kettle", "tea boiler"]), ("stewing casserole", ["dutch oven", "stew pot"]),
         ("insulated flask", ["thermos", "coffee mug"]), ("mixing bowl", ["bowl", "salad bowl"]),
         ("storage canister", ["food container", "jar", "tupperware"]), ("saucepan", ["pan", "pot"]),
         ("serving carafe", ["jug", "pitcher"]), ("baking dish", ["oven dish", "casserole tin"])],
    ),
    "tools": (
        ["power", "duty", "weight"],
        ["Kraftum", "Stalvik", "Boltero", "Ferrox", "Rigmate", "Tundrak"],
        [("impact driver", ["drill", "screw gun"]), ("hedge shears", ["hedge trimmer", "bush cutter"]),
         ("lawn mower", ["grass cutter", "mower"]), ("chain saw", ["chainsaw", "log cutter"]),
         ("orbital sander", ["sander", "sanding machine"]), ("pressure washer", ["jet wash", "power washer"]),
         ("leaf blower", ["garden vac", "blower"]), ("angle grinder", ["grinder", "metal cutter"])],
    ),
    "clothing": (
        ["audience", "size", "fabric"],
        ["Lindqvist", "Morano", "Tessaly", "Northbay", "Velour & Co", "Ardenne"],
        [("pullover", ["jumper", "sweater"]), ("trousers", ["pants", "slacks"]), ("undershirt", ["vest", "tank top"]),
         ("cardigan", ["knit jacket", "cardi"]), ("dressing gown", ["bathrobe", "robe"]), ("blazer", ["suit jacket"]),
         ("nightwear set", ["pyjamas", "pjs"]), ("tunic", ["long shirt", "smock"])],
    ),
    "outdoor": (
        ["people", "weather", "weight"],
        ["Fjellvan", "Kestrel Ridge", "Oakfell", "Summitra", "Wildrow", "Campeon"],
        [("trekking shelter", ["tent", "camping tent"]), ("sleeping bag", ["sleep sack", "slumber bag"]),
         ("sun canopy", ["gazebo", "awning"]), ("inflatable kayak", ["canoe", "rubber boat"]),
         ("picnic rug", ["picnic blanket", "beach mat"]), ("hammock", ["hanging bed", "swing bed"]),
         ("camp stretcher", ["camp bed", "cot"]), ("hiking pack", ["backpack", "rucksack"])],
    ),
    "electronics": (
        ["screen", "storage", "link"],
        ["Novatek One", "Zentrix", "Auralis", "Pixelon", "Quantiq", "Vireo"],
        [("notebook computer", ["laptop"]), ("slate tablet", ["tablet", "pad"]), ("smart television", ["tv", "telly"]),
         ("all-in-one PC", ["desktop", "computer"]), ("media monitor", ["monitor", "display"]),
         ("digital frame", ["photo frame", "picture screen"]), ("portable projector", ["beamer", "projector"]),
         ("gaming console", ["games machine", "console"])],
    ),
    "beauty": (
        ["skin", "scent", "pack"],
        ["Sorelle", "Belladue", "Puravia", "Nordlys", "Amberly", "Cleo & Vane"],
        [("facial emulsion", ["face cream", "moisturiser"]), ("cleansing bar", ["soap", "soap bar"]),
         ("body lotion", ["skin milk", "lotion"]), ("exfoliator", ["scrub", "peeling"]), ("lip balm", ["chapstick"]),
         ("bath foam", ["bubble bath"]), ("sun fluid", ["sunscreen", "sun cream"]), ("toner mist", ["face spray"])],
    ),
    "nursery": (
        ["age", "colour", "fabric"],
        ["Tinkerow", "Babelou", "Wombly", "Petitoile", "Snugglund", "Minikin"],
        [("romper suit", ["onesie", "babygrow"]), ("plush animal", ["teddy", "soft toy"]), ("play mat", ["baby gym"]),
         ("swaddle wrap", ["baby blanket"]), ("booties", ["baby shoes"]), ("bib", ["dribble cloth"]),
         ("sun bonnet", ["baby hat"]), ("carry sling", ["baby carrier", "wrap carrier"])],
    ),
    "food": (
        ["diet", "pack", "scent"],
        ["Goldacre", "Verdano", "Hearth & Rye", "Nutrelle", "Oatsby", "Maplewick"],
        [("cereal bar", ["granola bar", "snack bar"]), ("sandwich biscuit", ["cookie", "cookies"]),
         ("drink powder", ["shake", "smoothie mix"]), ("boiled sweets", ["candy", "hard candy"]),
         ("loose leaf infusion", ["tea", "herbal tea"]), ("porridge pot", ["oatmeal", "instant oats"]),
         ("cake mix", ["baking mix"]), ("chewing gum", ["gum"])],
    ),
    "pets": (
        ["breed", "colour", "material"],
        ["Pawsome Hill", "Fellmate", "Whiskerly", "Barkwood", "Tailor & Tail", "Rovero"],
        [("feeding bowl", ["dog bowl", "food dish"]), ("resting basket", ["pet bed", "dog bed"]),
         ("neck strap", ["collar", "dog collar"]), ("carry crate", ["pet carrier", "cage"]),
         ("chew toy", ["dog toy", "bone toy"]), ("drinking fountain", ["water dispenser"]),
         ("grooming brush", ["fur brush", "comb"]), ("litter tray", ["cat toilet", "litter box"])],
    ),
}  # fmt: skip

PITCHES = (
    "Delivered within two days.",
    "Two years of guarantee.",
    "Free returns for 30 days.",
    "A favourite of our customers.",
    "New in this season.",
    "Tested by our own team.",
    "While stocks last.",
    "Designed to last for years.",
)
