"""Words that deny a finding, put it in doubt, or end what such words reach: the data of `bvl.metrics.labeller`.

Regular expressions over lower-case text with single spaces. Where two cues overlap, the one that begins first
counts, then the longer: "no change in" hides its "no", "cannot be excluded" its "excluded".
"""

from __future__ import annotations

_BE = r"(?:is|are|was|were|be|been|being|appears?|seems?|remains?)"
_MODAL = r"(?:may|might|could|can|would)"
_UNABLE = r"(?:cannot|can not|could not|unable to|difficult to|hard to|(?:not|im)\s?possible to|not able to|does not|did not|do not)"
_SEEN = (
    r"(?:seen|identified|visuali[sz]ed|visible|demonstrated|appreciated|evident|present|apparent|detected|noted|"
    r"observed|found|shown|recogni[sz]ed|confirmed|depicted|discernible|suspected|suggested)"
)
_TREND = (
    r"(?:change|increase|decrease|improvement|progression|worsening|resolution|clearing|enlargement|growth|reduction|"
    r"difference|development)s?"
)
_HOW = (
    r"(?: (?:significant|interval|appreciable|definite|substantial|gross|marked|major|obvious|further|overall|acute|"
    r"clear|apparent|other|relevant))"
)

# "no change in the effusion", "not only a nodule", "nearly resolved", "consistent with": neither denied nor in doubt.
NEUTRAL = (
    rf"(?:no|without){_HOW}* {_TREND}(?: in| of| to| from| since)?",
    rf"(?:no|without){_HOW}* (?:evidence|sign|suggestion)s? of{_HOW}* {_TREND}(?: in| of)?",
    r"consistent with (?:a |the |known |given )*history of",
    r"not only",
    r"no doubt",
    r"no comparisons?",
    r"no prior\w*",
    r"no previous\w*",
    r"(?:has|have|had|is|are) not (?:\w+ )?(?:chang|increas|decreas|resolv|improv|worsen|progress|clear|grown?|enlarging)\w*",
    r"not (?:as )?\w+ (?:as|changed)",
    r"not (?:well|fully|completely|significantly|entirely|clearly) (?:\w+ )?(?:changed|different|evaluated|seen|visuali[sz]ed)",
    r"(?:near|nearly|almost|partial|partially|largely|mostly|incomplete|incompletely|near complete|near-complete)"
    r"(?: complete| completely| interval)? (?:resol\w+|clear\w+)(?: of)?",
    r"(?:consistent|compatible|in keeping|keeping|associated|correlat\w+|compared|comparison|along) with",
    r"more likely than not",
)
# Reach to the right.
DENIED = (
    r"(?:no|without)(?: \w+){0,2} (?:evidence|signs?|suggestion|indication)s? (?:of|for|that)",
    r"no longer",
    r"no\b(?! longer)",
    r"not",
    r"non",
    r"nor",
    r"neither",
    r"none of",
    r"nothing",
    r"never",
    r"without",
    r"w/o",
    r"negative for",
    r"(?:free|clear|devoid|void|cleared) (?:of|from)",
    r"(?:absence|lack) of",
    r"lacks?|lacking",
    r"absent",
    r"(?:fails?|failed|failure) to",
    r"den(?:ies|ied|y|ying)",
    r"rather than",
    r"instead of",
    r"(?:as )?opposed to",
    r"rul(?:es|ed) out",
    r"exclud(?:es|ing)",
    r"(?:has|have|was|were) excluded(?= (?:a|an|the|any)\b)",
    r"(?:resolution|clearing|clearance|disappearance|removal) of",
    r"resolved",
)
DOUBTED = (
    rf"{_UNABLE} (?:\w+ )?(?:exclude|rule out|rule-out)",
    r"(?:rule out|r/o|to exclude|exclude|(?:evaluate|assess|check|look) for|evaluation for|question of|query)",
    r"possib(?:le|ly|ility of|ility)",
    r"probabl[ey]",
    r"(?:most|more|less|very|quite) likely",
    r"likely",
    r"unlikely",
    r"question(?:able|ably)",
    r"(?<!clinical )question",
    r"(?:raises?|raising) (?:the )?(?:question|possibility|concern|suspicion) (?:of|for|that)",
    r"(?:suspicio\w+|worrisome|worry|concern\w*) (?:for|of|about)",
    r"suspect(?:ed)?",
    r"suggest(?:s|ed|ing|ive of|ion of|ive)?",
    rf"{_MODAL} (?:also |well )?(?:\w+ly )?(?:be|represent|reflect|indicate|relate|have|suggest|correspond|contain|show|include|account)",
    r"perhaps|maybe|presum(?:ed|ably|ptive)|equivocal|borderline|potential(?:ly)?|doubtful|conceivably",
    r"differential(?: \w+){0,4} (?:includ\w+|is|of)|differential diagnos[ei]s",
    r"(?:favou?rs?|favou?ring|favou?red to \w+|consider|considerations? includes?)",
    r"not (?:definitely|necessarily|certainly)",
    r"\?",
)
# The text asks or tells of another time: nothing is stated.
UNSTATED = (
    r"(?:history|hx|h/o) of",
    r"h/o",
    r"risks? (?:of|for)",
    r"risk factors? for",
    r"if(?! (?:present|any|real))",
    r"in case of",
    r"screening for",
)
# Reach to the left.
DENIED_AFTER = (
    rf"(?:{_BE} )?(?:not|never)(?: been| clearly| definitely| currently| readily| reliably| otherwise)* {_SEEN}",
    rf"(?:{_BE} )?no longer (?:{_BE} )?(?:\w+ly )?(?:{_SEEN}|there)",
    rf"(?:{_BE} |: ?)(?:now |completely |otherwise )*(?:absent|negative|none|excluded|ruled out|resolved|gone)",
    r": ?no(?:t (?:seen|present))?(?=[ .]*$)",
    r"(?:has|have|had) (?:now |since |completely |entirely |fully |been |subsequently )*"
    r"(?:resolved|cleared|disappeared|gone|excluded|ruled out|removed|vanished)",
    r"(?:absent|ruled out|resolved)(?=[ .,;]*$)",
    r"does not exist",
    rf"(?:{_BE} )?within (?:the )?(?:normal limits|limits of normal)",
)
DOUBTED_AFTER = (
    r"(?:cannot|can not|could not|may not) (?:\w+ )?be (?:\w+ )?(?:exclud\w+|ruled out|assessed|evaluated|confirmed)",
    rf"(?:{_BE} |has |have )?(?:not|difficult to be) (?:been )?(?:\w+ly )?(?:excluded|ruled out)",
    rf"(?:{_BE} )?difficult to (?:\w+ )?(?:exclude|rule out)(?=[ .,;]*$)",
    rf"{_BE} (?:\w+ )?(?:possible|a possibility|unlikely|doubtful|questionable|questioned|suspected|favou?red|uncertain|"
    r"equivocal|probable|conceivable|a consideration|in the differential)(?! (?:that|to|over))",
    rf"{_BE} not (?:very )?likely",
    rf"(?:{_MODAL} be|is|are) (?:a |an |other |also )*considerations?",
    rf"{_MODAL} not be (?:\w+ )?{_SEEN}",
    rf"{_BE} (?:also |most |very |more |less )*likely(?=[ .,;]*$)",
    rf"{_MODAL} (?:also |still )?(?:be present|be considered|exist)",
    r"(?:(?:less|un)likely|suspected|questioned|possible)(?=[ .,;]*$)",
    r",? ?if (?:present|any|real)",
)
# Reach both ways.
DOUBTED_AROUND = (
    r"versus|vs\.?",
    rf"{_BE} (?:favou?red|more likely|less likely|preferred) (?:over|than)",
    r"favou?red over",
)
# End a clause: nothing reaches over them.
STOPS = (
    r"but|however|although|though|yet|while|whereas|despite|nevertheless|otherwise|because|where|which|who",
    r"except(?:ing)?(?: for)?|apart from|aside from|other than|besides|save for",
    r"with|showing|shows|demonstrat(?:es|ing)|reveal(?:s|ing)|there (?:is|are|has|have|was|were)|following|after|then",
    r"[():;]| - | -- ",
)
# End a list of denied or doubted findings where they follow a comma or "and".
OPENERS = (
    r"an?|one|two|three|four|several|multiple|many|few|some|both|single|solitary|this|there|mild|mildly|moderate|"
    r"moderately|severe|marked|small|tiny|large|minimal|stable|unchanged|persistent|increas(?:ed|ing)|decreas(?:ed|ing)|"
    r"worsening|improv(?:ed|ing)|faint|dense|prominent|pale|dark|bright|positive|status|chronic|old|healed|calcified|"
    r"again|also|interval"
)
# A comma after one of these goes on with the same noun phrase: "no acute, displaced fracture".
ADJECTIVES = r"acute|subacute|displaced|nondisplaced|focal|large|small|definite|obvious|significant|discrete|suspicious|new|visible"
FINITE_VERBS = (
    r"is|are|was|were|has|have|had|remains?|appears?|persists?|seems?|measures?|shows?|overlies|contains?|projects?|"
    r"noted|seen|identified"
)
