"""The report: a store, and the students that learned from it, as one HTML page that needs nothing else.

look      look: what is read of a store, some samples and the figures over their rows
words     tokens as text, piece by piece
figures   the plots, as SVG that takes the page's colours
students  read_student, watch: how students did, and what they say
html      Page: all that as one file, with page.css and page.js
"""
