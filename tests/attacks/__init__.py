"""Files as somebody would write them who means harm, against everything that reads them."""
