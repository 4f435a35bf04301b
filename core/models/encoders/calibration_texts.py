"""Texts for int8: a network runs on them at load to measure the range of its values, and to check the result.

Prose, questions, code, lists and numbers in several scripts, short and long, because each makes other channels large.
They are the same for every checkpoint and on every machine, so a checkpoint's vectors are the same everywhere, too.
"""

from __future__ import annotations

#: Texts that value ranges are measured on.
MEASURED = [
    "harbour",
    "The ferry leaves at seven in the morning.",
    "Which of the two roads is shorter in winter, and who keeps it free of snow?",
    "She had not been in the house for twenty years, and yet little in it had changed: the clock still stood on the "
    "shelf, the letters lay where her brother had left them, and a fine dust covered the piano, the chairs and the "
    "long table by the window. Outside, the garden had grown into the field behind it. She opened a drawer, found the "
    "key that she had come for, and sat down for a while before she went out to tell the others. They were waiting at "
    "the gate with the car, two suitcases and a dog that nobody had mentioned in any of the letters.",
    "Return the rows whose key lies between first and last, in the order of the index. Raises ValueError if first is "
    "greater than last. Changed in version 3.2: an empty range gives an empty list, and None is no longer accepted.",
    "def area(width: float, height: float) -> float:\n    if min(width, height) < 0:\n        raise ValueError('no "
    "negative sides')\n    return width * height\n\nprint(area(2.5, 4), [n ** 2 for n in range(10)], {'a': 1})",
    "Revenue rose by 12.5 % to 3,481 million in 2019; costs fell to 1,907 million (2018: 2,044 million), see table 7.",
    "1. flour  2. water  3. salt  4. yeast -- mix, wait 12 h, bake at 230 °C for 45 min !!! ??? (see p. 114)",
    "https://example.org/a/b?c=d&e=f#g  mail@example.org  +49 30 901820  2024-02-29T23:59:60Z  0x7fffffff  v1.0.0-rc.2",
    "Die Brücke wurde im Herbst gesperrt, weil das Wasser höher stand als in allen Jahren zuvor.",
    "Le marché ouvre à huit heures ; les légumes viennent des jardins de l’autre rive.",
    "El profesor preguntó quién había traído el mapa, y nadie quiso contestar.",
    "Поезд отправляется завтра утром с третьего пути, билеты можно купить у проводника.",
    "明天早上的火车从三号站台出发,请提前十五分钟到达车站。",
    "昨日の雨で川の水が増え、橋を渡ることができなくなりました。",
    "어제 내린 비로 강물이 불어나서 다리를 건널 수 없었습니다.",
    "يفتح السوق في الثامنة صباحا ويغلق عند غروب الشمس.",
    "बाज़ार सुबह आठ बजे खुलता है और शाम को बंद हो जाता है।",
]

#: Texts that the quantized network is checked on; none of the measured ones.
CHECKED = [
    "lantern",
    "How do I find out why a process was ended by the kernel?",
    "The committee met on Thursday to decide whether the old mill should be restored or replaced. After three hours of "
    "talk, and against the advice of the engineer, who had pointed at the cracks in the northern wall, it voted for "
    "repairs in two stages, the first of which is to begin as soon as the river is low enough.",
    "A dictionary that remembers the order in which keys were added; deleting a key and adding it again moves it to "
    "the end. Equality with another such dictionary is sensitive to order.",
    "Il pleut depuis hier, et la rivière monte encore.",
    "La reunión se aplazó hasta el lunes porque faltaban dos firmas.",
    "Книга лежала на столе, открытая на той же странице.",
    "图书馆周末开放到晚上九点。",
]
