"""How a plan is told: text, page, timetable, quote."""
