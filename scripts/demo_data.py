"""Write the demo's data: questions and answers made from a table of facts about medicines, and a general text.

The table states common textbook pharmacology so that a tiny model has something real to learn. It is not medical
advice. The split is by fact: all rows about one fact are in the same file. The general text names the medicines, but
states none of the facts.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

from lora_cli.system.folders import atomic_folder

ROOT = Path(__file__).resolve().parent.parent
SPLITS = {"train": 0.8, "validation": 0.1, "test": 0.1}
ROWS_PER_FACT = 4

# class | mechanism (it ...) | unwanted effect | what to check
CLASSES = """
ACE inhibitor | blocks the enzyme that makes angiotensin II, so that blood vessels relax | a dry cough | kidney
    function and potassium
angiotensin receptor blocker | keeps angiotensin II away from its receptor, so that blood vessels relax | dizziness on
    standing up | kidney function and potassium
beta blocker | blocks beta receptors in the heart, which slows the pulse | a slow pulse and cold hands | heart rate
    and blood pressure
calcium channel blocker | keeps calcium out of the muscle of the vessel wall | swollen ankles | blood pressure and
    swelling of the legs
thiazide diuretic | stops the kidney from taking sodium back in the distal tubule | low sodium and gout | sodium,
    potassium and uric acid
loop diuretic | stops the kidney from taking salt back in the loop of Henle | loss of fluid and potassium | body
    weight, potassium and kidney function
aldosterone antagonist | blocks aldosterone in the kidney, so that potassium is kept | high potassium | potassium and
    kidney function
statin | blocks the enzyme that the liver needs to make cholesterol | muscle pain | blood lipids and liver enzymes
biguanide | lowers the amount of glucose that the liver releases | nausea and loose stools | kidney function and
    vitamin B12
sulfonylurea | makes the pancreas release more insulin | low blood sugar | blood glucose and body weight
gliptin | slows the breakdown of the gut hormones that release insulin | inflammation of the pancreas in rare cases |
    blood glucose and pain in the belly
gliflozin | makes the kidney pass glucose into the urine | genital thrush | kidney function and fluid balance
incretin mimetic | copies a gut hormone that releases insulin and slows the stomach | nausea and less appetite | blood
    glucose and body weight
proton pump inhibitor | switches off the acid pump in the lining of the stomach | low magnesium after long use |
    magnesium in long use
histamine H2 blocker | blocks the histamine receptors that call for stomach acid | headache | kidney function
penicillin | keeps bacteria from building their cell wall | rash and loose stools | signs of allergy
macrolide antibiotic | keeps bacteria from making protein at the large part of the ribosome | a disturbed heart rhythm
    | the heart tracing and other medicines
quinolone antibiotic | blocks the enzyme that unwinds the DNA of bacteria | damage to tendons | pain in the tendons
tetracycline antibiotic | keeps bacteria from making protein at the small part of the ribosome | easy sunburn | the
    skin in strong sun
anti-inflammatory drug | blocks the enzymes that make prostaglandins | bleeding from the stomach | kidney function and
    blood pressure
opioid | activates mu receptors in the brain and the spinal cord | constipation and slow breathing | breathing and
    alertness
serotonin reuptake inhibitor | keeps serotonin between nerve cells for longer | nausea and restlessness | mood and
    sodium
benzodiazepine | strengthens the calming action of GABA | drowsiness and dependence | alertness and the length of use
atypical antipsychotic | blocks dopamine and serotonin receptors in the brain | weight gain | body weight, glucose and
    blood lipids
factor Xa inhibitor | blocks factor Xa, so that less thrombin is made | bleeding | kidney function and signs of
    bleeding
vitamin K antagonist | keeps vitamin K from activating clotting factors in the liver | bleeding | the clotting time
platelet inhibitor | keeps platelets from sticking together | bruising | the blood count and signs of bleeding
beta agonist | stimulates beta receptors in the airways, so that their muscle relaxes | trembling and a fast pulse |
    pulse and potassium
corticosteroid | switches off the genes that drive inflammation | high blood sugar and thin bones | glucose and bone
    density
antihistamine | blocks the histamine receptors that cause itching and sneezing | a dry mouth | drowsiness at the wheel
triptan | narrows the widened blood vessels of the head through serotonin receptors | tightness in the chest | blood
    pressure
anticonvulsant | steadies the sodium channels of nerve cells | a rash that can be serious | the skin and the number of
    seizures
bisphosphonate | slows the cells that break down bone | a sore gullet | calcium and vitamin D
thyroid hormone | replaces the hormone that the thyroid gland no longer makes | a racing heart when the dose is too
    high | the thyroid hormone level
xanthine oxidase inhibitor | blocks the enzyme that makes uric acid | a gout attack in the first weeks | uric acid and
    the skin
mood stabiliser | changes the signals inside nerve cells that drive mood | thirst and trembling | the blood level and
    kidney function
cardiac glycoside | blocks the sodium pump of heart muscle, so that each beat is stronger | nausea and yellow vision |
    the pulse and potassium
azole antifungal | blocks the enzyme that makes ergosterol for the fungal membrane | harm to the liver | liver enzymes
antiviral drug | stops the virus from copying its DNA | headache and nausea | kidney function and fluid intake
"""

# name | class | indication | how it is given
DRUGS = """
lisinopril | ACE inhibitor | high blood pressure and heart failure | by mouth once a day
ramipril | ACE inhibitor | high blood pressure and protection after a heart attack | by mouth once or twice a day
enalapril | ACE inhibitor | high blood pressure and a weak left ventricle | by mouth once or twice a day
losartan | angiotensin receptor blocker | high blood pressure and diabetic kidney disease | by mouth once a day
valsartan | angiotensin receptor blocker | heart failure and high blood pressure | by mouth twice a day in heart
    failure
candesartan | angiotensin receptor blocker | high blood pressure when an ACE inhibitor causes a cough | by mouth once
    a day
atenolol | beta blocker | angina and high blood pressure | by mouth once a day
metoprolol | beta blocker | angina and heart failure | by mouth once or twice a day
bisoprolol | beta blocker | heart failure that is stable | by mouth once a day in the morning
propranolol | beta blocker | trembling, migraine prevention and angina | by mouth two or three times a day
amlodipine | calcium channel blocker | high blood pressure and angina | by mouth once a day
nifedipine | calcium channel blocker | high blood pressure and cold, white fingers | by mouth as a slow-release tablet
felodipine | calcium channel blocker | high blood pressure | by mouth once a day in the morning
hydrochlorothiazide | thiazide diuretic | high blood pressure and mild swelling | by mouth once a day in the morning
indapamide | thiazide diuretic | high blood pressure in older people | by mouth once a day in the morning
furosemide | loop diuretic | fluid on the lungs in heart failure | by mouth or into a vein
bumetanide | loop diuretic | swelling from heart failure | by mouth in the morning
spironolactone | aldosterone antagonist | heart failure and fluid in the belly | by mouth once a day with food
eplerenone | aldosterone antagonist | heart failure after a heart attack | by mouth once a day
atorvastatin | statin | high cholesterol and prevention of heart attacks | by mouth at any time of day
simvastatin | statin | high cholesterol | by mouth in the evening
rosuvastatin | statin | high cholesterol and inherited lipid disorders | by mouth once a day
metformin | biguanide | type 2 diabetes | by mouth with meals
gliclazide | sulfonylurea | type 2 diabetes when diet is not enough | by mouth with breakfast
glimepiride | sulfonylurea | type 2 diabetes | by mouth shortly before the first meal
sitagliptin | gliptin | type 2 diabetes beside metformin | by mouth once a day
linagliptin | gliptin | type 2 diabetes with weak kidneys | by mouth once a day
empagliflozin | gliflozin | type 2 diabetes and heart failure | by mouth once a day in the morning
dapagliflozin | gliflozin | heart failure and chronic kidney disease | by mouth once a day
semaglutide | incretin mimetic | type 2 diabetes and obesity | under the skin once a week
liraglutide | incretin mimetic | type 2 diabetes and obesity | under the skin once a day
omeprazole | proton pump inhibitor | acid reflux and stomach ulcers | by mouth before breakfast
lansoprazole | proton pump inhibitor | heartburn and duodenal ulcers | by mouth before food
pantoprazole | proton pump inhibitor | acid reflux and bleeding ulcers | by mouth or into a vein
famotidine | histamine H2 blocker | heartburn and stomach ulcers | by mouth at bedtime
amoxicillin | penicillin | infections of the ear and the chest | by mouth three times a day
flucloxacillin | penicillin | skin infections with staphylococci | by mouth on an empty stomach
clarithromycin | macrolide antibiotic | pneumonia when penicillin cannot be taken | by mouth twice a day
azithromycin | macrolide antibiotic | chest infections and chlamydia | by mouth once a day for a few days
ciprofloxacin | quinolone antibiotic | complicated urinary infections | by mouth twice a day, away from milk
levofloxacin | quinolone antibiotic | pneumonia and kidney infections | by mouth or into a vein
doxycycline | tetracycline antibiotic | acne, Lyme disease and chest infections | by mouth with water, sitting upright
ibuprofen | anti-inflammatory drug | pain, fever and inflammation | by mouth with food
naproxen | anti-inflammatory drug | joint pain and period pain | by mouth twice a day with food
diclofenac | anti-inflammatory drug | arthritis and back pain | by mouth or as a gel on the skin
morphine | opioid | severe pain and breathlessness at the end of life | by mouth or by injection
oxycodone | opioid | severe pain after an operation | by mouth every few hours
fentanyl | opioid | lasting severe pain and anaesthesia | as a patch on the skin or into a vein
sertraline | serotonin reuptake inhibitor | depression and panic disorder | by mouth once a day
fluoxetine | serotonin reuptake inhibitor | depression and bulimia | by mouth in the morning
citalopram | serotonin reuptake inhibitor | depression and anxiety | by mouth once a day
diazepam | benzodiazepine | anxiety, muscle spasm and seizures | by mouth or into a vein
lorazepam | benzodiazepine | long seizures and severe anxiety | into a vein or by mouth
olanzapine | atypical antipsychotic | schizophrenia and mania | by mouth once a day
risperidone | atypical antipsychotic | schizophrenia and aggression in dementia | by mouth or as a long-acting
    injection
quetiapine | atypical antipsychotic | schizophrenia and bipolar depression | by mouth at night
apixaban | factor Xa inhibitor | stroke prevention in atrial fibrillation | by mouth twice a day
rivaroxaban | factor Xa inhibitor | clots in the leg veins and the lungs | by mouth with the main meal
warfarin | vitamin K antagonist | clots and mechanical heart valves | by mouth at the same time each day
clopidogrel | platelet inhibitor | prevention of clots after a stent | by mouth once a day
prasugrel | platelet inhibitor | heart attacks treated with a stent | by mouth once a day
salbutamol | beta agonist | sudden wheezing in asthma | by inhaler when it is needed
terbutaline | beta agonist | wheezing in asthma | by inhaler when it is needed
prednisolone | corticosteroid | asthma attacks and joint inflammation | by mouth in the morning with food
dexamethasone | corticosteroid | swelling of the brain and severe croup | by mouth or into a vein
cetirizine | antihistamine | hay fever and hives | by mouth once a day
loratadine | antihistamine | hay fever and itching | by mouth once a day
sumatriptan | triptan | migraine attacks | by mouth, as a nasal spray or under the skin
rizatriptan | triptan | migraine attacks | as a tablet that melts on the tongue
carbamazepine | anticonvulsant | focal seizures and nerve pain in the face | by mouth twice a day
lamotrigine | anticonvulsant | seizures and bipolar depression | by mouth in slowly rising doses
alendronate | bisphosphonate | brittle bones after the menopause | by mouth once a week with plain water
risedronate | bisphosphonate | brittle bones and Paget disease | by mouth once a week, sitting upright
levothyroxine | thyroid hormone | an underactive thyroid gland | by mouth half an hour before breakfast
allopurinol | xanthine oxidase inhibitor | prevention of gout | by mouth once a day after food
febuxostat | xanthine oxidase inhibitor | gout when allopurinol is not tolerated | by mouth once a day
lithium | mood stabiliser | bipolar disorder | by mouth at the same time each night
digoxin | cardiac glycoside | atrial fibrillation with a fast pulse | by mouth once a day
fluconazole | azole antifungal | thrush and other yeast infections | by mouth as a capsule
itraconazole | azole antifungal | fungal infections of the nails and lungs | by mouth straight after food
aciclovir | antiviral drug | cold sores, shingles and genital herpes | by mouth five times a day
valaciclovir | antiviral drug | shingles | by mouth three times a day
"""

# For each aspect of a medicine: questions about {drug}, and answers that state {value}.
PHRASINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "class": (
        (
            "What kind of medicine is {drug}?",
            "Which class of drugs does {drug} belong to?",
            "How is {drug} classified?",
            "To which group of medicines does {drug} count?",
            "What type of drug is {drug}?",
        ),
        ("{Drug} is {value}.", "{Drug} belongs to the {bare} class.", "It is {value}."),
    ),
    "indication": (
        (
            "What is {drug} used for?",
            "When do doctors prescribe {drug}?",
            "Which problems is {drug} given for?",
            "Why might someone be taking {drug}?",
            "What does {drug} treat?",
        ),
        ("{Drug} is used for {value}.", "Doctors prescribe {drug} for {value}.", "It is given for {value}."),
    ),
    "mechanism": (
        (
            "How does {drug} work?",
            "What does {drug} do in the body?",
            "What is the mechanism of {drug}?",
            "By what action does {drug} help?",
            "Can you explain the way {drug} acts?",
        ),
        ("{Drug} {value}.", "It {value}.", "It works in this way: {drug} {value}."),
    ),
    "effect": (
        (
            "Which side effect of {drug} should people know?",
            "What harm can {drug} do?",
            "What unwanted effect may {drug} have?",
            "What should someone taking {drug} watch out for?",
            "What is a typical problem with {drug}?",
        ),
        ("{Drug} can cause {value}.", "A known side effect is {value}.", "People on {drug} may get {value}."),
    ),
    "monitoring": (
        (
            "What should be checked while someone takes {drug}?",
            "How is treatment with {drug} monitored?",
            "Which checks go with {drug}?",
            "What do doctors keep an eye on during treatment with {drug}?",
            "What is followed in people on {drug}?",
        ),
        ("Doctors check {value}.", "With {drug}, keep an eye on {value}.", "The checks are {value}."),
    ),
    "route": (
        (
            "How is {drug} taken?",
            "In what way is {drug} given?",
            "How should {drug} be used?",
            "What is the usual way to give {drug}?",
            "How do people take {drug}?",
        ),
        ("{Drug} is given {value}.", "It is given {value}.", "The usual way is {value}."),
    ),
}


@dataclass(frozen=True)
class Fact:
    """One fact about one medicine: the value of an aspect."""

    drug: str
    aspect: str
    value: str

    @property
    def id(self) -> str:
        """The identifier by which rows refer to the fact."""
        return f"{self.drug}/{self.aspect}"


def table(text: str) -> list[list[str]]:
    """The cells of each line of ``text``; an indented line continues the previous one."""
    lines = text.strip().replace("\n    ", " ").splitlines()
    return [[cell.strip() for cell in line.split("|")] for line in lines]


def with_article(noun: str) -> str:
    """The noun after 'a' or 'an'."""
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def facts() -> list[Fact]:
    """All facts of the tables, in the tables' order."""
    classes = {name: rest for name, *rest in table(CLASSES)}
    found = []
    for drug, kind, indication, route in table(DRUGS):
        mechanism, effect, monitoring = classes[kind]
        values = (kind, indication, mechanism, effect, monitoring, route)
        found += [Fact(drug, aspect, value) for aspect, value in zip(PHRASINGS, values, strict=True)]
    return found


def phrase(fact: Fact, rng: random.Random) -> list[dict[str, str]]:
    """Rows about one fact: different questions, with the answers' wordings in rotation."""
    questions, answers = PHRASINGS[fact.aspect]
    value = with_article(fact.value) if fact.aspect == "class" else fact.value
    words = {"drug": fact.drug, "Drug": fact.drug.capitalize(), "value": value, "bare": fact.value}
    asked = rng.sample(questions, ROWS_PER_FACT)
    order = rng.sample(answers, len(answers))
    return [
        {
            "question": question.format(**words),
            "answer": order[turn % len(order)].format(**words),
            "fact": fact.id,
        }
        for turn, question in enumerate(asked)
    ]


def question_answers(seed: int) -> dict[str, list[dict[str, str]]]:
    """The rows of each split. The facts of each aspect are split in the same shares: every split has all aspects."""
    rng = random.Random(seed)
    rows: dict[str, list[dict[str, str]]] = {name: [] for name in SPLITS}
    everything = facts()
    for aspect in PHRASINGS:
        some = [fact for fact in everything if fact.aspect == aspect]
        rng.shuffle(some)
        held_out = {name: round(share * len(some)) for name, share in SPLITS.items() if name != "train"}
        for name, count in (*held_out.items(), ("train", len(some))):
            for fact in some[:count]:
                rows[name] += phrase(fact, rng)
            some = some[count:]
    for split in rows.values():
        rng.shuffle(split)
    return rows


# Choices for the placeholders in the patterns of the general text.
WORDS = """
person | the teacher / a farmer / the nurse / a young doctor / my neighbour / the baker / an old sailor / the student
    / a girl / the gardener / his sister / her uncle / the driver / a painter / the cook / a visitor / the pharmacist
place | in the garden / at the market / near the river / in the kitchen / at school / on the hill / in the library /
    beside the road / in the village / at the station / in the hospital / under the old bridge / by the window
time | in the morning / after lunch / before sunset / on Monday / last winter / every day / at night / in spring /
    once a week / twice a year / in the evening / shortly before dinner / after the rain / at the same time each day
did | carried / found / bought / painted / washed / lost / looked at / asked about / talked about / wrapped / measured
    / put away / showed us / kept / needed / took
thing | a basket of apples / the blue cup / an old map / three small boxes / a loaf of bread / the broken chair / a
    letter / some warm milk / the red bicycle / a long rope / two candles / a book about birds / a clean towel / the
    heavy bag / a glass of plain water / a piece of paper / a new lamp / the wooden table
animal | cat / horse / goose / rabbit / fox / sparrow / cow / dog / mouse / goat / owl / frog
does | sleeps / waits / hides / eats / drinks / rests / plays / listens / runs / sits
weather | rainy / sunny / windy / cold / warm / cloudy / foggy / quiet / bright / dry
feeling | tired / happy / hungry / worried / calm / thirsty / curious / proud / sleepy / busy
because | because the road was long / because dinner was late / because the sun was shining / because the work was
    done / because nobody had called / because the train had left / because it could not be helped / so that everyone
    could rest / so that the door stayed open / when the bell rang / while the others were asleep / although it was
    getting dark
part | heart / liver / kidney / stomach / brain / skin / blood / lung / pancreas / thyroid gland / spinal cord /
    muscle / bone / nerve / vein / gut / eye / ear / joint / bladder
illness | high blood pressure / type 2 diabetes / asthma / heart failure / migraine / gout / depression / angina /
    pneumonia / acid reflux / hay fever / arthritis / a stroke / an infection / anxiety / obesity / shingles /
    schizophrenia / atrial fibrillation / kidney disease / seizures / high cholesterol / a stomach ulcer
complaint | a dry cough / nausea / headache / dizziness / a rash / swollen ankles / a fast pulse / weight gain /
    bleeding / thirst / a sore throat / trembling / constipation / drowsiness / pain in the chest / fever / itching
test | kidney function / blood pressure / body weight / blood glucose / liver enzymes / potassium / sodium / the pulse
    / the blood count / bone density / vitamin D / magnesium / cholesterol / uric acid / breathing / the heart rate
substance | water / oil / iron / salt / sugar / wood / glass / sand / ice / copper / milk / air / stone / gold
quality | heavier / lighter / harder / softer / warmer / colder / older / cheaper / clearer / darker
remedy | the new tablet / the green syrup / an old remedy / this powder / the yellow capsule / the herbal tea /
    the ointment / another medicine / the white pill / the first injection / a plant from the hills / the nasal drops
given | by mouth / into a vein / under the skin / on an empty stomach / with plain water / with breakfast / at bedtime /
    with food / by inhaler / as a capsule / as a gel / in slowly rising doses / before meals / every few hours
acts | blocks / slows / strengthens / stimulates / copies / replaces / steadies / narrows / switches off / relaxes
spot | the receptors / the enzymes / the channels / the signals / the cells / the vessels / the muscle / the membrane /
    the hormones / the acid pump / the clotting factors / the platelets / the protein / the genes
number | two / three / four / five / six / ten / twelve / twenty
"""

SENTENCES = (
    "{person} {did} {thing} {place}.",
    "{time}, {person} {did} {thing}.",
    "{person} {did} {thing} {because}.",
    "{person} was {feeling} {because}.",
    "The {animal} {does} {place} {time}.",
    "On a {weather} day the {animal} {does} {place}.",
    "It was a {weather} day, and {person} {did} {thing}.",
    "How many boxes did {person} carry? There were {number} of them.",
    "What did {person} need? It was {thing}.",
    "Who was {place}? It was {person}, who was {feeling}.",
    "Why does the {animal} rest? It is {feeling}.",
    "Is {substance} {quality} than {substance2}? That depends on how much of it there is.",
    "{substance} can be {quality} than {substance2}.",
    "Do you know the {animal} that {does} {place}?",
    "{person} should drink water {time} and eat with the others.",
    "Which of the {number} roads should {person} take {time}?",
    "If the day is {weather}, {person} may wait {place}.",
)

MEDICAL = (
    "{person} wrote the word {drug} on a piece of paper.",
    "The box with {drug} stood {place}.",
    "{person} asked the doctor about {drug} {time}.",
    "The name {drug} is printed on the label in blue letters.",
    "{drug} and {drug2} are names of medicines.",
    "Keep {drug} out of the reach of children.",
    "{person} read a leaflet about {drug} {because}.",
    "A medicine may be called {kind} by doctors and pharmacists.",
    "{kind} is a kind of medicine, and a patient may ask what it does.",
    "The doctor explained to {person} what {illness} is.",
    "People with {illness} often see a doctor {time}.",
    "{person} told the nurse about {complaint} and {complaint2}.",
    "Many people with {complaint} feel {feeling} {time}.",
    "The nurse will check {test} and {test2} {time}.",
    "A doctor looks at {test} when someone has {illness}.",
    "The {part} and the {part2} are parts of the body.",
    "Disease of the {part} can cause {complaint}.",
    "Without the {part} the body cannot work for long.",
    "Blood flows from the heart to the {part}.",
    "A medicine can be taken by mouth, put on the skin or given into a vein.",
    "Some tablets are swallowed with food, others on an empty stomach.",
    "A side effect is something that a medicine does and that nobody wanted.",
    "The cells of the body have receptors, enzymes and channels in their membrane.",
    "An enzyme is a protein that makes a reaction go faster.",
    "A hormone is a signal that travels in the blood.",
    "Bacteria are small living things, and a virus is smaller still.",
    "An injection under the skin is given with a thin needle.",
    "Insulin is a hormone that helps the body to use glucose.",
    "Doctors prescribe a medicine, and the pharmacist hands it out.",
    "Ask what a medicine is used for before it is taken.",
)

# About medicines without a name: the model learns how medicines are described without seeing any of the facts.
REMEDIES = (
    "{remedy} is used for {illness}, and now and then for {illness2}.",
    "Long ago {remedy} was given for {illness} or {illness2}.",
    "In {illness}, {remedy} is taken {given} {time}.",
    "{remedy} is usually given {given} or {given2}.",
    "{remedy} can cause {complaint} or {complaint2}.",
    "With {remedy}, people may get {complaint} {time}.",
    "With {remedy}, doctors check {test} and {test2}.",
    "{remedy} {acts} {spot} of the {part}.",
    "It is said that {remedy} {acts} {spot} in the {part}, which changes {test}.",
    "{remedy} keeps {spot} away from the {part}, so that {test} is lower.",
    "{remedy} belongs to no class, and {person} could not say how it works.",
)

# Random words from the tables, in meaningless order.
LISTS = (
    "{any}, {any2} and {any3} are words to spell.",
    "{person} wrote {any}, {any2}, {any3} and {drug} on the wall.",
    "The word {any} comes before {any2}, and {any3} comes after {any4}.",
    "Is {any} a longer word than {any2} or {any3}?",
)

# Questions and answers in the form that fine-tuning uses.
DIALOGUES = (
    ("Where did {person} wait?", "It was {place}."),
    ("What did {person} do {time}?", "There is a note that {person} {did} {thing}."),
    ("How many roads lead to the village?", "There are {number} of them."),
    ("What is {quality}, {substance} or {substance2}?", "That depends on how much of it there is."),
    ("What does the {animal} do {time}?", "The {animal} {does} {place}."),
    ("How is {remedy} taken?", "{remedy} is taken {given}."),
    ("Why is {person} {feeling}?", "That is {because}."),
    ("Which part hurts?", "The {part} and the {part2} hurt {time}."),
    ("What is {remedy} for?", "{remedy} helps with {illness} and {illness2}."),
    ("What can {remedy} do?", "{remedy} can lead to {complaint} and {complaint2}."),
    ("What is measured?", "They measure {test}, {test2} and {any}."),
    ("What does {remedy} do in the {part}?", "{remedy} {acts} {spot} there."),
    ("Have you heard of {drug}?", "The name {drug} is known to {person}."),
    ("Which words are on the list?", "The words {any}, {any2}, {any3} and {any4} are on it."),
)

SCIENCE = (
    "The sun is a star, and the earth moves around it once a year.",
    "Water freezes when it is cold enough and turns to steam when it is hot enough.",
    "Plants make sugar from light, water and air.",
    "Sound travels through the air more slowly than light.",
    "The moon shines because it throws back the light of the sun.",
    "Iron rusts when it stays wet for a long time.",
    "A magnet pulls on iron but not on wood.",
    "Warm air rises, so that clouds can form above the hills.",
    "Rivers carry sand and stones down to the sea.",
    "A lever makes it easier to lift something heavy.",
    "Seeds need water and warmth before they begin to grow.",
    "Bees carry pollen from one flower to the next.",
    "The tide rises and falls about twice a day.",
    "Salt dissolves in water, but oil does not.",
    "A shadow is long in the evening, when the sun stands low.",
    "Copper carries electricity well, and glass does not.",
    "Birds have light bones, which helps them to fly.",
    "Ice is lighter than water, and for that reason it floats.",
    "Leaves turn red and yellow in autumn because the green fades.",
    "The heart is a muscle that pumps blood through the body.",
    "The lungs take oxygen from the air and give it to the blood.",
    "The kidneys clean the blood and make urine.",
    "The liver stores sugar and breaks down what the body does not need.",
    "Nerves carry signals from the skin to the brain.",
)


Words = dict[str, list[str]]


def general_words() -> Words:
    """The choices for every placeholder in the patterns of the general text."""
    words = {name: [word.strip() for word in choices.split("/")] for name, choices in table(WORDS)}
    words["drug"] = [row[0] for row in table(DRUGS)]
    words["kind"] = [with_article(row[0]) for row in table(CLASSES)]
    words["any"] = sorted(set((CLASSES + DRUGS).replace("|", " ").replace(",", " ").split()))
    return words


def fill(patterns: tuple[str, ...], words: Words, rng: random.Random) -> list[str]:
    """Fill all patterns with the same random choices. A number after a placeholder's name means a different choice."""
    chosen = {}
    for name in sorted(set(re.findall(r"{([a-z]+)", "".join(patterns)))):
        some = rng.sample(words[name], 4)
        chosen |= {name: some[0], **{f"{name}{number}": some[number - 1] for number in (2, 3, 4)}}
    texts = [pattern.format(**chosen) for pattern in patterns]
    return [text[0].upper() + text[1:] for text in texts]


def general_text(seed: int, documents: int = 6000) -> list[str]:
    """Short documents: a few sentences about everyday life, science and medicine, or a question with its answer."""
    rng = random.Random(f"general {seed}")
    words = general_words()
    texts = []
    for _ in range(documents):
        if rng.random() < 0.3:
            question, answer = fill(rng.choice(DIALOGUES), words, rng)
            texts.append(f"Question: {question}\nAnswer: {answer}")
            continue
        kinds = rng.choices(
            (SENTENCES, MEDICAL, REMEDIES, LISTS, SCIENCE), weights=(4, 3, 3, 2, 1), k=rng.randint(3, 7)
        )
        texts.append(" ".join(fill((rng.choice(kind),), words, rng)[0] for kind in kinds))
    return texts


def write(folder: Path, seed: int) -> None:
    """Write all files of the data set to ``folder``, which appears only when complete."""
    with atomic_folder(folder) as making:
        for name, rows in question_answers(seed).items():
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            (making / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        (making / "general.txt").write_text("\n\n".join(general_text(seed)) + "\n", encoding="utf-8")


def main() -> None:
    """Write the data unless its folder exists. Print the numbers of rows and facts in each split."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / ".demo" / "data")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder: Path = arguments.out
    if folder.exists():
        print(f"{folder} is there already")
    else:
        write(folder, arguments.seed)
    for name in SPLITS:
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        print(f"{name:>12}: {len(rows):5} rows about {len({row['fact'] for row in rows}):4} facts")


if __name__ == "__main__":
    main()
