"""Words of common findings on chest radiographs, for `bvl.metrics.labeller`; written from general knowledge.

The names cover those of CheXpert (Irvin et al. 2019) and the commoner headings of radiograph reports.
"""

from __future__ import annotations

from bvl.metrics.labeller import Lexicon

_GAP = r"(?: [\w/]+){0,4}"
_VESSELS = r"(?:vasculature|vascularity|vessels|veins)"
_FINDINGS: dict[str, tuple[str, ...]] = {
    "atherosclerosis": (
        r"(?:athero|arterio)scler\w+(?: (?:vascular )?(?:calcif\w+|disease|changes?|plaques?))?",
    ),
    "atelectasis": (r"atelecta\w+", r"(?:lobar|lung|lobe) collapse"),
    "blunted costophrenic angle": (
        rf"blunt\w+{_GAP} (?:costophrenic|sulc\w+|angles?)",
        rf"(?:costophrenic|sulc\w+|angles?){_GAP} blunt\w+",
    ),
    "bronchiectasis": (r"bronchiecta\w+",),
    "calcification": (
        r"calcifications?",
        r"calcifi(?:ed|c)",
        r"calcinosis",
    ),
    "cardiomegaly": (
        r"cardiomegaly",
        rf"(?:heart|cardiac|cardio\w* silhouette){_GAP} (?:enlarge(?:d|ment)|large|borderline)",
        r"borderline (?:(?:large|enlarged) )?(?:heart|cardiac)(?: size)?",
        r"enlarge(?:d|ment)(?: of)?(?: the)? (?:heart|cardi\w+)(?: \w+)?",
    ),
    "cavity": (r"cavit(?:y|ies|ary|ation|ations)(?: lesions?)?",),
    "consolidation": (
        r"consolidati(?:on|ons|ve)(?: opacit(?:y|ies))?",
        r"air ?space (?:disease|consolidations?)",
    ),
    "cyst": (r"cysts?", r"bullae?", r"blebs?"),
    "degenerative change": (
        r"degenerat\w+(?: \w+){0,2}? changes?",
        r"degenerative (?:\w+ ){0,2}disease",
        r"degenerati(?:ve|on)",
        r"spondylosis",
        r"syndesmophytes?|spurs?|spurring",
        r"(?:endplate|hypertrophic) changes?",
        r"osteophyt\w+",
        r"arthriti[cs](?: changes?)?",
        r"osteoarthr\w+",
    ),
    "edema": (r"(?:pulmonary |interstitial |alveolar )*o?edema",),
    "elevated diaphragm": (
        r"elevat(?:ed|ion)(?: \w+){0,3} (?:hemi)?diaphragms?",
        r"(?:hemi)?diaphragms?(?: \w+){0,3} elevat(?:ed|ion)",
        r"eventrations?",
    ),
    "emphysema": (
        r"(?<!subcutaneous )emphysema\w*",
        r"copd",
        r"(?:chronic )?obstructive (?:pulmonary|lung|airways?) disease",
    ),
    "fibrosis": (r"fibros[ie]s", r"fibrotic"),
    "fracture": (r"fractur\w+",),
    "granuloma": (
        r"(?:(?:non)?calcified (?:\w+ ){0,3})?granulom(?:a|as|ata)",
        r"granulomatous(?: (?:diseases?|changes?|process|infection))?",
    ),
    "heart failure": (r"(?:congestive )?(?:heart|cardiac) failure", r"chf"),
    "hiatal hernia": (r"hia(?:tal|tus) hernias?",),
    "hyperinflation": (
        r"(?:hyper|over) ?(?:inflat|expan|aerat|lucen)\w+",
        r"flatten\w+(?: \w+){0,3} (?:hemi)?diaphragms?",
    ),
    "interstitial disease": (
        r"interstitial (?:lung |pulmonary )?(?:disease|opacit(?:y|ies)|opacification|markings?|changes?|prominence|thickening|pattern)",
    ),
    "kyphosis": (r"kypho(?:sis|tic|scoliosis)",),
    "lymphadenopathy": (r"(?:lymph)?adenopathy", r"enlarged (?:\w+ )?lymph nodes?"),
    "malignancy": (r"malignan(?:cy|cies|t)", r"(?:lung )?(?:cancer|carcinoma|neoplasms?)"),
    "mass": (
        r"mass(?:es)?",
        r"mass ?like",
    ),
    "mediastinal widening": (
        rf"(?:mediastin\w+){_GAP} (?:widened|widening|enlarged)",
        r"(?:widened|enlarged|wide|widening of the) (?:\w+ )?mediastinum",
        r"mediastinal widening",
    ),
    "nodule": (r"(?<!lymph )nodul(?:es?|arity)",),
    "opacity": (
        r"opaci(?:ty|ties|fication|fications)",
        r"infiltrat\w*",
        r"(?:radio)?densit(?:y|ies)",
        r"interstitial opacit(?:y|ies)",
        r"interstitial opacification",
    ),
    "osteopenia": (r"osteopeni[ac]", r"osteoporo\w+", r"deminerali[sz]\w+"),
    "pleural effusion": (
        r"(?<!pericardial )effusions?",
        r"pleural (?:effusions?|fluid)",
        r"hydro(?:pneumo)?thorax",
    ),
    "pleural thickening": (r"pleural(?: \w+){0,2} thickening", r"thickening of the(?: \w+)? pleura"),
    "pneumomediastinum": (r"pneumomediastinum",),
    "pneumonia": (r"(?:broncho)?pneumoni(?:a|as|tis)",),
    "pneumoperitoneum": (r"pneumoperitoneum", r"free(?: \w+){0,2} air"),
    "pneumothorax": (r"(?:hydro)?pneumothora(?:x|xes|ces)",),
    "scar": (r"scar(?:s|ring|red)?", r"cicatri\w+"),
    "scoliosis": (
        r"(?:kypho)?scolio(?:sis|tic)",
        r"(?:(?:dextro|levo|s shaped|spin\w+|thora\w+|lumbar) ?)+ curvature",
        r"(?:dextro|levo)(?: ?curvature|scoliosis)",
        r"curvature (?:of the )?(?:\w+ )?(?:spine|thora\w+)",
    ),
    "support device": (
        r"catheters?",
        r"tubes?",
        r"pacemakers?",
        r"port a cath",
        r"(?:picc|central|venous) lines?",
        r"picc",
        r"tracheostomy",
        r"stents?",
        r"(?:pacing |pacer |monitor )?leads?",
        r"prosthe\w+|valve replacements?",
        r"ports?",
        r"(?:pacer|aicd|icd|defibrillator)",
    ),
    "tortuous aorta": (
        rf"(?:aort\w+){_GAP} (?:tortuo\w+|ectatic|ectasia|unfold\w+)",
        r"(?:tortuo\w+|ectatic|ectasia|unfold\w+)(?: [\w/]+){0,6} aorta",
    ),
    "tuberculosis": (r"tubercul\w+", r"tb"),
    "vascular congestion": (
        r"(?:vascular|pulmonary|venous|central) (?:vascular |venous )?(?:congestion|engorgement)",
        r"congestion",
        rf"(?:pulmonary|central|vascular|lung) {_VESSELS} (?:prominence|redistribution|cephali[sz]ation|engorge\w+)",
        r"vascular (?:prominence|redistribution|cephali[sz]ation)",
        rf"(?:prominen\w+|increased|engorged)(?: \w+){{0,3}} {_VESSELS}",
        rf"{_VESSELS}{_GAP} (?:prominent|engorged|increased)",
    ),
}
_ACUTE = ("consolidation", "edema", "opacity", "pleural effusion", "pneumonia", "pneumothorax")
_LUNG = ("atelectasis", "consolidation", "edema", "mass", "nodule", "opacity", "pneumonia")
_BE = r"(?:is|are|appears?|remains?)"

CHEST_LEXICON = Lexicon(
    findings=_FINDINGS,
    normal={
        r"no(?: \w+){0,2} acute (?:\w+ ){0,3}(?:abnormalit(?:y|ies)|diseases?|process(?:es)?|findings?)": _ACUTE,
        r"no active (?:\w+ ){0,2}disease": _ACUTE,
        r"normal (?:chest|study|exam(?:ination)?)(?! wall)": tuple(_FINDINGS),
        rf"(?:chest|study|exam(?:ination)?) (?:radiograph |x ray )?{_BE} (?:\w+ )?(?:normal|unremarkable)": tuple(
            _FINDINGS
        ),
        rf"lungs?(?: fields?)? {_BE} (?:\w+ ){{0,2}}clear": _LUNG,
        r"clear lungs": _LUNG,
        rf"(?:heart|cardiac|cardio\w+)(?: \w+){{0,4}} {_BE} (?:\w+ )?(?:normal|unremarkable)|normal heart size": (
            "cardiomegaly",
        ),
    },
)
